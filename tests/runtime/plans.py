"""Small plans made by hand, and the launcher that runs a module's kernels on the CPU from raw
pointers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import sympy
import torch

from iocompiler.plan.data import KernelStep, Plan, Schedule, Step, TensorSpec, all_steps
from iocompiler.runtime.kernels import KernelSpec
from iocompiler.runtime.values import size_value
from iocompiler.tile.index import Affine, Axis, Size, product
from iocompiler.tile.interpret import run
from iocompiler.tile.program import Buffer, Builder, TileProgram

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


def interpreter(plan: Plan) -> Callable[[KernelSpec], Callable[..., None]]:
    """A binder for `load_text`: kernels of ``plan`` run by the tile interpreter on what the
    pointers point to.
    """
    steps = [step for step in all_steps(plan) if isinstance(step, KernelStep)]
    # a module's kernels are its distinct programs, in order; equal step names get a number there
    distinct = iter(dict.fromkeys((step.program, step.schedule) for step in steps))
    programs: dict[str, TileProgram] = {}

    def bind(kernel: KernelSpec) -> Callable[..., None]:
        if kernel.name not in programs:
            programs[kernel.name] = next(distinct)[0]
        program = programs[kernel.name]

        def launch(stream: int, gx: int, gy: int, gz: int, *arguments: Any) -> None:
            assert all(isinstance(g, int) for g in (gx, gy, gz))
            values, numbers = arguments[: len(program.buffers)], arguments[len(program.buffers) :]
            sizes = dict(zip(program.size_symbols, numbers, strict=True))
            buffers = {
                b.name: _behind(b, value, sizes)
                for b, value in zip(program.buffers, values, strict=True)
            }
            run(program, buffers, sizes, None)

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
