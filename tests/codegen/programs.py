"""Tile programs by hand, each with its schedules and the same computation in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from iocompiler.plan.data import Schedule
from iocompiler.tile.index import Affine, Axis, Size, product
from iocompiler.tile.program import Buffer, Builder, TileProgram

F32, F64, BF16, F16, I32, I64, BOOL = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int32,
    torch.int64,
    torch.bool,
)
N = sympy.Symbol("s0", integer=True, positive=True)
M = sympy.Symbol("s1", integer=True, positive=True)
X0, X1, R0 = Affine.of("x0"), Affine.of("x1"), Affine.of("r0")


@dataclass(frozen=True)
class Case:
    """``inputs`` makes the in (and inout) buffers, ``expected`` the out buffers from them."""

    program: TileProgram
    inputs: Callable[[], dict[str, torch.Tensor]]
    expected: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    schedules: tuple[Schedule, ...]
    sizes: dict[str, int] = field(default_factory=dict)
    exact: bool = False
    libdevice: bool = False  # calls what Triton's interpreter has not

    def buffers(self) -> dict[str, torch.Tensor]:
        """Flat buffers; what is to be written holds a number nobody computes."""
        made = {name: t.clone().reshape(-1) for name, t in self.inputs().items()}
        for b in self.program.buffers:
            if b.name not in made:
                poison = 77 if b.dtype != BOOL else True
                made[b.name] = torch.full((self.at(b.elements),), poison, dtype=b.dtype)
        return made

    def at(self, size: Size) -> int:
        if isinstance(size, int):
            return size
        return int(size.subs({s: self.sizes[s.name] for s in size.free_symbols}))


def pointwise(*blocks: int) -> tuple[Schedule, ...]:
    return tuple(Schedule("pointwise", x_block=b, num_warps=1) for b in blocks)


def persistent(r_block: int, *x_blocks: int) -> tuple[Schedule, ...]:
    return tuple(Schedule("persistent", x_block=x, r_block=r_block, num_warps=1) for x in x_blocks)


def looped(r_block: int, *x_blocks: int) -> tuple[Schedule, ...]:
    return tuple(Schedule("looped", x_block=x, r_block=r_block, num_warps=1) for x in x_blocks)


def axes(*sizes: Size, reduced: bool = False) -> tuple[Axis, ...]:
    return tuple(Axis(f"{'r' if reduced else 'x'}{i}", s) for i, s in enumerate(sizes))


def ins(**shapes: tuple[torch.dtype, Size]) -> tuple[Buffer, ...]:
    return tuple(Buffer(n, dtype, "in", e) for n, (dtype, e) in shapes.items())


def outs(**shapes: tuple[torch.dtype, Size]) -> tuple[Buffer, ...]:
    return tuple(Buffer(n, dtype, "out", e) for n, (dtype, e) in shapes.items())


def number(build: Builder, value: Any, dtype: torch.dtype = F32) -> int:
    return build.const(value, dtype)


def unary(
    fn: str,
    dtype: torch.dtype,
    reference: Callable[..., torch.Tensor],
    values: torch.Tensor,
    libdevice: bool = False,
    result: torch.dtype | None = None,
) -> Case:
    """``out = fn(in)`` over as many points as there are values."""
    build, count = Builder(), values.numel()
    made = build.map(fn, build.load("a", X0, dtype), dtype=result or dtype)
    build.store("out", X0, made)
    buffers = ins(a=(dtype, count)) + outs(out=(result or dtype, count))
    wide = F64 if dtype in (F32, F64) else dtype
    return Case(
        build.program(axes(count), (), buffers),
        lambda: {"a": values},
        lambda b: {"out": reference(b["a"].to(wide))},
        pointwise(8),
        libdevice=libdevice,
    )


def rows(
    body: Callable[[Builder, int], int],
    reference: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, int],
    schedules: tuple[Schedule, ...],
    dtype: torch.dtype = F32,
    out: torch.dtype | None = None,
    row_result: bool = False,
    values: Callable[[], torch.Tensor] | None = None,
    symbolic: bool = False,
    **flags: Any,
) -> Case:
    """``out[x0, r0]`` (or ``out[x0]``) from row x0 of ``a``; ``body`` makes it from the element."""
    count, width = (N, M) if symbolic else shape
    build = Builder()
    value = build.load("a", X0 * width + R0, dtype)
    if dtype == BF16:
        value = build.cast(value, F32)
    made = body(build, value)
    out = out or dtype
    if dtype == BF16:
        made = build.cast(made, out)
    build.store("out", X0 if row_result else X0 * width + R0, made)
    elements = product([count, width])
    buffers = ins(a=(dtype, elements)) + outs(out=(out, count if row_result else elements))
    source = values or (lambda: torch.randn(shape).to(dtype))
    precise = F64 if dtype.is_floating_point else dtype
    return Case(
        build.program(axes(count), axes(width, reduced=True), buffers),
        lambda: {"a": source()},
        lambda b: {"out": reference(b["a"].reshape(shape).to(precise))},
        schedules,
        {"s0": shape[0], "s1": shape[1]} if symbolic else {},
        **flags,
    )


def softmax(build: Builder, x: int) -> int:
    e = build.map("exp", build.map("sub", x, build.reduce("max", x, build.dtype(x))))
    return build.map("div", e, build.reduce("sum", e, build.dtype(x)))


def logsumexp(build: Builder, x: int, limit: float = float("inf"), instead: float = 0.0) -> int:
    """As torch has it: below 0 where the maximum is infinite."""
    top = build.reduce("max", x, F32)
    infinite = build.map("eq", build.map("abs", top), build.const(limit, F32), dtype=torch.bool)
    below = build.map("where", infinite, build.const(instead, F32), top, dtype=F32)
    powers = build.map("exp", build.map("sub", x, below))
    return build.map("add", below, build.map("log", build.reduce("sum", powers, F32)))


def normalise(width: Size) -> Callable[[Builder, int], int]:
    def body(build: Builder, x: int) -> int:
        n = number(build, width)
        d = build.map("sub", x, build.map("div", build.reduce("sum", x, F32), n))
        variance = build.map("div", build.reduce("sum", build.map("mul", d, d), F32), n)
        return build.map(
            "mul", d, build.map("rsqrt", build.map("add", variance, number(build, 1e-5)))
        )

    return body


def variance(width: Size) -> Callable[[Builder, int], int]:
    """Corrected for what rounding the mean left, as ops/decomposed/moments.py has it."""

    def body(build: Builder, x: int) -> int:
        n = number(build, width)
        d = build.map("sub", x, build.map("div", build.reduce("sum", x, F32), n))
        rest = build.reduce("sum", d, F32)
        squares = build.reduce("sum", build.map("mul", d, d), F32)
        left = build.map("mul", rest, build.map("div", rest, n))
        return build.map("div", build.map("sub", squares, left), n)

    return body


def fold(fn: str, dtype: torch.dtype) -> Callable[[Builder, int], int]:
    return lambda build, x: build.reduce(fn, x, dtype)


def scan(fn: str) -> Callable[[Builder, int], int]:
    return lambda build, x: build.scan(fn, x)


def both(r_block: int, whole: int) -> tuple[Schedule, ...]:
    """The row in pieces and whole, one row a program and several."""
    return persistent(whole, 1, 4) + looped(r_block, 1, 4)
