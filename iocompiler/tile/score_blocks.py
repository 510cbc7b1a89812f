"""Which blocks of the scores a mask leaves, proved by interval arithmetic.

The mask is evaluated on ranges: i and j lie in a block, an operand between its least and its
greatest element there. Where it comes out true for the whole range the block is full, where false
it is empty, else partial. Vectorised over the grid of blocks; nothing is read back from the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from iocompiler.tile.score import ScoreOp, ScoreProgram


class Grid(NamedTuple):
    """``batch`` x ``heads`` matrices of ``rows`` x ``columns`` scores, blocks of ``m`` x ``n``."""

    batch: int
    heads: int
    rows: int
    columns: int
    m: int
    n: int

    @property
    def counts(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return -(-self.rows // self.m), -(-self.columns // self.n)


@dataclass(frozen=True)
class Range:
    """Least and greatest value for each block, float64, broadcastable to [B, H, M, N]; of a
    condition 0 and 1.
    """

    low: Tensor
    high: Tensor


def classify(
    program: ScoreProgram, grid: Grid, operands: Sequence[Tensor], numbers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(blocks in which some score may be kept, blocks in which every one is), both bool
    [B or 1, H or 1, M, N]; what lies beyond the last row or column is not looked at.
    """
    used = [operands[int(program.ops[v].value)] for v in program.loads(program.keep)]
    device = used[0].device if used else torch.device("cpu")
    if program.keep is None:
        every = torch.ones((1, 1, *grid.counts), dtype=torch.bool, device=device)
        return every, every
    found = _ranges(program, grid, operands, numbers, device)[program.keep]
    shape = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        found.low.shape, (1, 1, *grid.counts)
    )
    return (found.high > 0.0).expand(shape), (found.low > 0.0).expand(shape)


def classes_shape(program: ScoreProgram, grid: Grid) -> tuple[int, int, int, int]:
    """[B or 1, H or 1, rows of blocks, columns of blocks]."""
    batched, by_head = _differs(program)
    return (grid.batch if batched else 1, grid.heads if by_head else 1, *grid.counts)


@functools.lru_cache(maxsize=512)
def _differs(program: ScoreProgram) -> tuple[bool, bool]:
    """Whether the mask differs from batch to batch, and from head to head."""
    names = {program.ops[value].fn for value in program.behind(program.keep)}
    return "b" in names, "h" in names


def _ranges(
    program: ScoreProgram,
    grid: Grid,
    operands: Sequence[Tensor],
    numbers: Sequence[int],
    device: torch.device,
) -> dict[int, Range]:
    made: dict[int, Range] = {}
    for place in sorted(program.behind(program.keep)):
        op = program.ops[place]
        if op.kind == "index":
            made[place] = _places(op.fn, grid, device)
        elif op.kind in ("const", "number"):
            value = float(op.value if op.kind == "const" else numbers[int(op.value)])
            point = torch.full((1, 1, 1, 1), value, dtype=torch.float64, device=device)
            made[place] = Range(point, point)
        elif op.kind == "load":
            made[place] = _loaded(program, op, grid, operands[int(op.value)])
        elif op.kind == "cast":
            made[place] = _cast(op, made[op.inputs[0]])
        else:
            made[place] = _mapped(op, [made[v] for v in op.inputs])
    return made


def _places(name: str, grid: Grid, device: torch.device) -> Range:
    length, block, dim = {
        "b": (grid.batch, 1, 0),
        "h": (grid.heads, 1, 1),
        "i": (grid.rows, grid.m, 2),
        "j": (grid.columns, grid.n, 3),
    }[name]
    first = torch.arange(0, length, block, dtype=torch.float64, device=device)
    shape = [-1 if d == dim else 1 for d in range(4)]
    last = (first + (block - 1)).clamp_max(length - 1)
    return Range(first.reshape(shape), last.reshape(shape))


def _cast(op: ScoreOp, x: Range) -> Range:
    return Range(x.low.trunc(), x.high.trunc()) if op.type == "int" else x


# operands


def _loaded(program: ScoreProgram, op: ScoreOp, grid: Grid, operand: Tensor) -> Range:
    """The range of an operand: block by block along the dims whose subscript is an index itself,
    over all of the others.
    """
    dims: list[tuple[int, int, int]] = []  # (dim of the operand, dim of the grid, block)
    values = operand if operand.dtype != torch.bool else operand.view(torch.uint8)
    lengths = {"b": grid.batch, "h": grid.heads, "i": grid.rows, "j": grid.columns}
    for dim, subscript in enumerate(op.inputs):
        index = program.ops[subscript]
        if index.kind == "index" and index.fn not in [program.ops[s].fn for s in op.inputs[:dim]]:
            values = values.narrow(dim, 0, lengths[index.fn])  # what lies behind is never read
            place = "bhij".index(index.fn)
            dims.append((dim, place, (1, 1, grid.m, grid.n)[place]))
    others = [d for d in range(operand.dim()) if d not in [dim for dim, _, _ in dims]]
    return Range(*(_reduced(values, dims, others, sign) for sign in (-1, 1)))


def _reduced(
    values: Tensor, dims: list[tuple[int, int, int]], others: list[int], sign: int
) -> Tensor:
    reduce = torch.amax if sign > 0 else torch.amin
    if others and values.numel():
        values = reduce(values, others, keepdim=True)
    for dim, _, block in dims:
        if block > 1:
            values = _blocked(values, dim, block, reduce)
    order = [dim for dim, _, _ in sorted(dims, key=lambda each: each[1])]
    values = values.permute(*order, *others).reshape([values.shape[d] for d in order])
    shape = [1, 1, 1, 1]
    for dim, place, _ in dims:
        shape[place] = values.shape[order.index(dim)]
    return values.reshape(shape).to(torch.float64)


def _blocked(values: Tensor, dim: int, block: int, reduce: Callable[..., Tensor]) -> Tensor:
    """The extremes of blocks along a dim; the last one may be short."""
    length = values.shape[dim]
    whole = length // block * block
    parts = []
    if whole:
        parts.append(reduce(_parted(values.narrow(dim, 0, whole), dim, block), dim + 1))
    if whole < length:
        parts.append(reduce(values.narrow(dim, whole, length - whole), dim, keepdim=True))
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _parted(values: Tensor, dim: int, block: int) -> Tensor:
    return values.unflatten(dim, (-1, block))  # type: ignore[no-any-return, no-untyped-call]


# operations


def _mapped(op: ScoreOp, x: list[Range]) -> Range:
    rule = _RULES.get(op.fn)
    if rule is not None:
        return rule(*x)
    # nothing is known of the rest
    point = x[0].low.new_zeros((1, 1, 1, 1))
    if op.type == "bool":
        return Range(point, point + 1.0)
    return Range(point - math.inf, point + math.inf)


def _truth(always: Tensor, ever: Tensor) -> Range:
    return Range(always.to(torch.float64), ever.to(torch.float64))


def _less(a: Range, b: Range) -> Range:
    # with a NaN the first is false and the second true: nothing is known
    return _truth(a.high < b.low, ~(a.low >= b.high))


def _less_or_equal(a: Range, b: Range) -> Range:
    return _truth(a.high <= b.low, ~(a.low > b.high))


def _equal(a: Range, b: Range) -> Range:
    points = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    return _truth(points, ~((a.high < b.low) | (b.high < a.low)))


def _not(a: Range) -> Range:
    return Range(1.0 - a.high, 1.0 - a.low)


def _corners(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Range, Range], Range]:
    """Of a function monotone in each argument where the other is held."""

    def rule(a: Range, b: Range) -> Range:
        ends = [f(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
        low, high = ends[0], ends[0]
        for end in ends[1:]:
            low, high = torch.minimum(low, end), torch.maximum(high, end)
        return Range(low, high)

    return rule


def _abs(a: Range) -> Range:
    low = torch.maximum(torch.maximum(a.low, -a.high), torch.zeros_like(a.low))
    return Range(low, torch.maximum(-a.low, a.high))


def _quotient(a: Range, b: Range) -> Range:
    """Of integers, rounded towards zero; unknown where the divisor may be 0."""
    known = (b.low > 0.0) | (b.high < 0.0)
    found = _corners(lambda x, y: (x / y).trunc())(a, b)
    return Range(torch.where(known, found.low, -math.inf), torch.where(known, found.high, math.inf))


def _remainder(a: Range, b: Range) -> Range:
    """Of integers that are not negative, by one positive number; else as large as the divisor."""
    same = (b.low == b.high) & (b.low > 0.0) & (a.low >= 0.0)
    same &= (a.low / b.low).floor() == (a.high / b.low).floor()
    most = torch.maximum(-b.low, b.high)
    low = torch.where(a.low >= 0.0, torch.zeros_like(most), -most)
    return Range(
        torch.where(same, torch.fmod(a.low, b.low), low),
        torch.where(same, torch.fmod(a.high, b.low), most),
    )


def _where(c: Range, a: Range, b: Range) -> Range:
    low = torch.where(c.low > 0.0, a.low, torch.minimum(a.low, b.low))
    high = torch.where(c.low > 0.0, a.high, torch.maximum(a.high, b.high))
    return Range(torch.where(c.high > 0.0, low, b.low), torch.where(c.high > 0.0, high, b.high))


def _both(a: Range, b: Range) -> Range:
    return Range(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high))


def _either(a: Range, b: Range) -> Range:
    return Range(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high))


_RULES: dict[str, Callable[..., Range]] = {
    "add": lambda a, b: Range(a.low + b.low, a.high + b.high),
    "sub": lambda a, b: Range(a.low - b.high, a.high - b.low),
    "mul": _corners(torch.mul),
    "neg": lambda a: Range(-a.high, -a.low),
    "abs": _abs,
    "maximum": lambda a, b: Range(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high)),
    "minimum": lambda a, b: Range(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high)),
    "int_trunc_div": _quotient,
    "int_trunc_mod": _remainder,
    "floor": lambda a: Range(a.low.floor(), a.high.floor()),
    "lt": _less,
    "le": _less_or_equal,
    "gt": lambda a, b: _less(b, a),
    "ge": lambda a, b: _less_or_equal(b, a),
    "eq": _equal,
    "ne": lambda a, b: _not(_equal(a, b)),
    "logical_not": _not,
    "bitwise_not": _not,
    "and": _both,
    "or": _either,
    "where": _where,
}
"""Conditions only for "and", "or" and "bitwise_not": programs have no bitwise integers."""
