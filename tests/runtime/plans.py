"""Small plans made by hand, and the launcher that runs a module's kernels on the CPU from raw
pointers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch

from iocompiler.options import Options
from iocompiler.plan.contents import all_steps
from iocompiler.plan.data import (
    ConstantStep,
    KernelStep,
    MatmulStep,
    Plan,
    Schedule,
    Step,
    TensorSpec,
    ViewStep,
)
from iocompiler.runtime.kernels import KernelSpec
from iocompiler.runtime.reference import run_matmul
from iocompiler.runtime.values import size_value
from iocompiler.tile.index import Affine, Axis, Size, product
from iocompiler.tile.interpret import run
from iocompiler.tile.program import Buffer, Builder, TileProgram

UNMEASURED = (
    Options(mode="max-autotune", engine="reference"),
    Options(mode="max-autotune", engine=lambda plan, gm: None),
    Options(mode="default"),
    Options(mode="reduce-overhead"),
    Options(mode="max-autotune"),
)
"""Under which nothing is timed; the last one where the device of a plan is not here."""

S0 = sympy.Symbol("s0", integer=True, positive=True)


def spec(
    *shape: Size, stride: tuple[Size, ...] | None = None, dtype: torch.dtype = torch.float32
) -> TensorSpec:
    """A tensor on the CPU, row-major unless strides are given."""
    if stride is None:
        stride = tuple(product(shape[dim + 1 :]) for dim in range(len(shape)))
    return TensorSpec(tuple(shape), stride, dtype, "cpu")


def binary(fn: str, elements: Size, dtype: torch.dtype = torch.float32) -> TileProgram:
    """``out[i] = fn(a[i], b[i])``."""
    builder, x = Builder(), Affine.of("x")
    result = builder.map(fn, builder.load("a", x, dtype), builder.load("b", x, dtype))
    builder.store("out", x, result)
    buffers = [Buffer("a", dtype, "in", elements), Buffer("b", dtype, "in", elements)]
    return builder.program(
        (Axis("x", elements),), (), (*buffers, Buffer("out", dtype, "out", elements))
    )


def scaled(elements: Size, dtype: torch.dtype = torch.float32) -> TileProgram:
    """``out[i] = factor * a[i]``, the factor passed by value."""
    builder, x = Builder(), Affine.of("x")
    factor = builder.load("factor", Affine(), dtype)
    builder.store("out", x, builder.map("mul", factor, builder.load("a", x, dtype)))
    buffers = (
        Buffer("a", dtype, "in", elements),
        Buffer("factor", dtype, "scalar", 1),
        Buffer("out", dtype, "out", elements),
    )
    return builder.program((Axis("x", elements),), (), buffers)


SCHEDULE = Schedule("pointwise", x_block=128)


def kernel(
    name: str, program: TileProgram, args: tuple[str, ...], out: TensorSpec, where: str = ""
) -> KernelStep:
    """A step that makes the last of its arguments."""
    lines = (where,) if where else ()
    return KernelStep(name, program, SCHEDULE, args, ((args[-1], out),), (name,), lines)


def plan(inputs: dict[str, TensorSpec | None], steps: list[Step], outputs: tuple[Any, ...]) -> Plan:
    return Plan(tuple(inputs.items()), tuple(steps), outputs, "cpu")


def on_a_gpu(plan: Plan) -> Plan:
    """The plan as it would be for a GPU: its text can be run on the CPU, as the tensors that it
    allocates are on the device that its module is told.
    """

    def there(spec: TensorSpec | None) -> TensorSpec | None:
        return None if spec is None else replace(spec, device="cuda:0")

    def moved(step: Step) -> Step:
        if isinstance(step, (ViewStep, ConstantStep)):
            return replace(step, spec=replace(step.spec, device="cuda:0"))
        outputs = tuple((name, there(spec)) for name, spec in step.outputs)
        return replace(step, outputs=outputs)  # type: ignore[arg-type]

    inputs = tuple((name, there(spec)) for name, spec in plan.inputs)
    return replace(plan, inputs=inputs, steps=tuple(map(moved, plan.steps)), device="cuda:0")


def interpreter(plan: Plan) -> Callable[[KernelSpec], Callable[..., None]]:
    """A binder for `load_text`: kernels of ``plan`` run by the tile interpreter on what the
    pointers point to.
    """
    steps = [step for step in all_steps(plan) if isinstance(step, (KernelStep, MatmulStep))]
    # a module's kernels are its distinct programs, in order; equal step names get a number there
    distinct = iter({step.kernel: step for step in steps}.values())
    first: dict[str, KernelStep | MatmulStep] = {}

    def bind(kernel: KernelSpec) -> Callable[..., None]:
        if kernel.name not in first:
            first[kernel.name] = next(distinct)
        step = first[kernel.name]

        def launch(stream: int, gx: int, gy: int, gz: int, *arguments: Any) -> None:
            assert all(isinstance(g, int) for g in (gx, gy, gz))
            values, numbers = arguments[: len(step.buffers)], arguments[len(step.buffers) :]
            sizes = dict(zip(step.size_symbols, numbers, strict=True))
            flat = [_behind(b, value, sizes) for b, value in zip(step.buffers, values, strict=True)]
            if isinstance(step, MatmulStep):
                run_matmul(step, flat, sizes)
            else:
                names = [b.name for b in step.buffers]
                run(step.program, dict(zip(names, flat, strict=True)), sizes, None)

        return launch

    return bind


def _behind(buffer: Buffer, value: Any, sizes: dict[str, int]) -> torch.Tensor:
    if buffer.role == "scalar":
        return torch.tensor([value], dtype=buffer.dtype)
    elements = size_value(buffer.elements, sizes)
    if elements == 0:
        return torch.empty(0, dtype=buffer.dtype)
    memory = (ctypes.c_char * (elements * buffer.dtype.itemsize)).from_address(value)
    return torch.frombuffer(memory, dtype=buffer.dtype)
