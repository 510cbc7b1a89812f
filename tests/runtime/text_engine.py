"""An engine that runs emitted modules on the CPU: what it compiles can be cached, and run by
another process from the text alone.

Kernels of a plan this process has made run in the tile interpreter, as in the other tests; those
that are known only as text by Triton's, under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from iocompiler.codegen.module import emit_module
from iocompiler.plan.contents import all_steps
from iocompiler.plan.data import BatchStep, Plan
from iocompiler.runtime import load
from iocompiler.runtime.kernels import KernelSpec, cells
from iocompiler.runtime.load import imported
from iocompiler.runtime.reference import run_plan
from tests.runtime.plans import interpreter

_DTYPES = {
    "fp32": torch.float32, "fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16,
    "i1": torch.bool, "u8": torch.uint8, "i8": torch.int8, "i16": torch.int16, "i32": torch.int32,
    "i64": torch.int64,
}  # fmt: skip
_folder = tempfile.TemporaryDirectory(prefix="iocompiler-tests-")
_count = itertools.count()


class TextEngine:
    """``Compiler(engine=TextEngine())``.

    Args:
        interpret: kernels run in Triton's interpreter even where their plan is known; plans with
            functions that it does not have run in the tile interpreter.
    """

    def __init__(self, interpret: bool = False) -> None:
        self._interpret = interpret

    def __call__(self, plan: Plan, gm: GraphModule) -> Callable[[list[Any]], list[Any]]:
        text = emit_module(plan, "graph")
        if self._interpret and "libdevice." in text:
            return _planned(plan, text)
        if not self._interpret or any(isinstance(step, BatchStep) for step in all_steps(plan)):
            _plans()[text] = plan
        return self.load_text(text, "graph", plan.device)

    def load_text(self, text: str, name: str, device: str) -> Callable[[list[Any]], list[Any]]:
        plan = _plans().get(text)
        if plan is not None and any(isinstance(step, BatchStep) for step in all_steps(plan)):
            return _planned(plan, text)
        binder = interpreter(plan) if plan is not None else lambda spec: bind(text, spec)
        return load.load_text(text, name, device, binder)


def _planned(plan: Plan, text: str) -> Callable[[list[Any]], list[Any]]:
    """What the tile interpreter cannot run from pointers."""

    def call(args: list[Any]) -> list[Any]:
        return run_plan(plan, args)

    call.source = text  # type: ignore[attr-defined]
    call._boxed_call = True  # type: ignore[attr-defined]
    return call


@functools.lru_cache(maxsize=1)
def _plans() -> dict[str, Plan]:
    return {}


def bind(text: str, spec: KernelSpec) -> Callable[..., None]:
    function = _function(text, spec.name)
    types = [p.type for p in spec.signature.parameters]

    def launch(stream: int, gx: int, gy: int, gz: int, *arguments: Any) -> None:
        assert all(isinstance(g, int) for g in (gx, gy, gz))
        if 0 in (gx, gy, gz):
            return
        taken = [
            _behind(value, _DTYPES[kind[1:]]) if kind.startswith("*") else value
            for kind, value in zip(types, arguments, strict=True)
        ]
        function[(gx, gy, gz)](*taken)

    return launch


def _behind(address: int, dtype: torch.dtype) -> torch.Tensor:
    """One element there; the interpreter goes on from its address."""
    memory = (ctypes.c_char * dtype.itemsize).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


def _function(text: str, name: str) -> Any:
    prelude, kernels, _ = cells(text)
    module_name = f"interpreted_{next(_count)}"
    path = Path(_folder.name) / f"{module_name}.py"
    path.write_text(f"{prelude}\n\n{re.sub(' +$', '', kernels[name])}")
    return getattr(imported(path, module_name), name)
