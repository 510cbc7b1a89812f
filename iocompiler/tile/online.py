"""Reductions that need not wait for the one they read: both go on in one pass over the row.

    top = max(x);  sum(exp(x - top))                        of a softmax
    top = max(x), 0 where infinite;  sum(exp(x - top))      of a logsumexp
    mean = sum(x) / n;  sum((x - mean)^2), sum(x - mean)    of a variance

Each lane of a kernel keeps what it needs to take in another element, and the lanes are put together
at the end (`codegen/rescaled.py`, `codegen/moments.py`). Only in float32, over the reduced axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from iocompiler.tile.index import product
from iocompiler.tile.program import Op, TileProgram


@dataclass(frozen=True)
class Online:
    """A reduction that goes on beside another.

    Attributes:
        kind: "powers", sum(exp(x - max x)); "squares", sum((x - mean)^2); "rests", sum(x - mean).
        beside: the place of the reduction it goes on beside: a maximum, or the sum behind a mean.
        against: the place of what is subtracted: that maximum, or 0 where it is infinite, or the
            mean.
    """

    kind: Literal["powers", "squares", "rests"]
    beside: int
    against: int


def online(program: TileProgram) -> dict[int, Online]:
    """The reductions of a program that go on beside another, by their places."""
    found = {}
    for position, op in enumerate(program.ops):
        if _is_sum(op):
            its = _powers(program, op.inputs[0]) or _deviations(program, op.inputs[0])
            if its is not None:
                found[position] = its
    return found


def means(beside: Mapping[int, Online]) -> dict[int, int]:
    """The sums that others go on beside, and the place of the mean behind each."""
    return {its.beside: its.against for its in beside.values() if its.kind != "powers"}


def levels(program: TileProgram) -> list[int]:
    """For each operation, how many passes over the row must be done before it can be computed."""
    beside = online(program)
    found: list[int] = []
    for position, op in enumerate(program.ops):
        level = max((found[r] for r in op.reads), default=0)
        if position in beside:
            level = found[beside[position].beside]
        elif op.kind == "reduce":
            level += 1
        found.append(level)
    return found


def _is_sum(op: Op) -> bool:
    return (op.kind, op.fn, op.over, op.dtype) == ("reduce", "sum", "reduced", torch.float32)


def _powers(program: TileProgram, power: int) -> Online | None:
    ops = program.ops
    if not _is_map(ops[power], "exp"):
        return None
    difference = ops[ops[power].inputs[0]]
    if not _is_map(difference, "sub"):
        return None
    value, against = difference.inputs
    top = _unguarded(program, against)
    maximum = ops[top]
    if (maximum.kind, maximum.fn, maximum.over) != ("reduce", "max", "reduced"):
        return None
    if maximum.inputs != (value,) or maximum.dtype != torch.float32:
        return None
    return Online("powers", top, against)


def _unguarded(program: TileProgram, value: int) -> int:
    """What a value is where that is not infinite, and 0 where it is; else the value itself."""
    ops = program.ops
    if not _is_map(ops[value], "where"):
        return value
    infinite, nothing, top = ops[value].inputs
    asked = ops[infinite]
    if ops[nothing].kind != "const" or ops[nothing].value != 0 or asked.kind != "map":
        return value
    if asked.fn == "isinf":
        return top if asked.inputs == (top,) else value
    if asked.fn != "eq":
        return value
    size, limit = (ops[each] for each in asked.inputs)
    is_limit = limit.kind == "const" and limit.value == float("inf")
    return top if is_limit and _is_map(size, "abs") and size.inputs == (top,) else value


def _deviations(program: TileProgram, value: int) -> Online | None:
    op = program.ops[value]
    if _is_map(op, "mul") and op.inputs[0] == op.inputs[1]:
        its = _less_its_mean(program, op.inputs[0])
        return its and Online("squares", *its)
    its = _less_its_mean(program, value)
    return its and Online("rests", *its)


def _less_its_mean(program: TileProgram, value: int) -> tuple[int, int] | None:
    """(the sum, the mean) where a value is an element less the mean of its row."""
    ops = program.ops
    if not _is_map(ops[value], "sub"):
        return None
    element, mean = ops[value].inputs
    if not _is_map(ops[mean], "div"):
        return None
    total, count = ops[mean].inputs
    if not _is_sum(ops[total]) or ops[total].inputs != (element,):
        return None
    if ops[count].kind != "const" or ops[count].value != product(
        [axis.size for axis in program.reduced]
    ):
        return None
    alone = all(total not in op.reads or place == mean for place, op in enumerate(ops))
    return (total, mean) if alone else None


def _is_map(op: Op, fn: str) -> bool:
    return (op.kind, op.fn, op.dtype) == ("map", fn, torch.float32)
