"""Steps of the matmul template: made from what users write, run in the interpreter or on a GPU."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter

from iocompiler.codegen.matmul import emit_matmul, matmul_grid, template_prelude
from iocompiler.plan.build import build_plan
from iocompiler.plan.data import MatmulStep, Plan
from iocompiler.plan.fold import folded
from iocompiler.plan.product import MatmulTile
from iocompiler.plan.sites import sites
from iocompiler.runtime.load import imported
from iocompiler.runtime.reference import run_plan
from iocompiler.runtime.values import size_value
from tests.plan.graphs import H200, Planned

_count = itertools.count()
_folder = tempfile.TemporaryDirectory(prefix="iocompiler-tests-")

SMALL = MatmulTile(16, 16, 16, num_warps=4, num_stages=2, group=2)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether the library may round float32 operands of products."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def kernel_of(step: MatmulStep) -> Any:
    """The ``@triton.jit`` function of a step, from a real file: Triton reads its source."""
    name = f"kernel_{next(_count)}"
    path = Path(_folder.name) / f"{name}.py"
    path.write_text(f"{template_prelude()}\n\n{emit_matmul(step, name)}")
    return getattr(imported(path, name), name)


def run_step(step: MatmulStep, buffers: list[Tensor], sizes: Mapping[str, int]) -> None:
    """Launch the kernel on what lies behind each of the step's arguments."""
    grid = tuple(size_value(size, sizes) for size in matmul_grid(step))
    if 0 in grid:
        return
    args = [
        tensor.item() if buffer.role == "scalar" else tensor
        for buffer, tensor in zip(step.buffers, buffers, strict=True)
    ]
    numbers = [sizes[name] for name in step.size_symbols]
    options = {"num_warps": step.tile.num_warps, "num_stages": step.tile.num_stages}
    kernel_of(step)[grid](*args, *numbers, **options)


class Folded(Planned):
    """Plans every graph of a function with all its sites folded, and runs it by the reference."""

    def __init__(self, tile: MatmulTile = SMALL) -> None:
        super().__init__()
        self.tile = tile

    def _compile(self, gm: GraphModule, inputs: Any) -> Any:
        super()._compile(gm, inputs)
        plan = folded(self.plans[-1], {s.key: self.tile for s in sites(self.plans[-1])})
        self.plans[-1] = plan
        return make_boxed_func(lambda *args: run_plan(plan, list(args)))

    @property
    def steps(self) -> list[MatmulStep]:
        return [s for plan in self.plans for s in plan.steps if isinstance(s, MatmulStep)]


def step_of(f: Callable[..., Any], *inputs: Tensor, tile: MatmulTile = SMALL) -> MatmulStep:
    """The one step of a function's forward."""
    planned = Folded(tile)
    planned(f)(*inputs)
    (step,) = planned.steps
    return step


def plan_on_fakes(f: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype) -> Plan:
    """The plan of a function's forward for tensors of these shapes, without making them."""
    found: list[Plan] = []

    class OnFakes(Planned):
        def _compile(self, gm: GraphModule, inputs: Any) -> Any:
            found.append(build_plan(gm, H200, "forward"))
            return make_boxed_func(lambda *args: Interpreter(gm).run(*args))

    with FakeTensorMode():
        OnFakes()(f)(*(torch.empty(shape, dtype=dtype) for shape in shapes))
    return found[0]
