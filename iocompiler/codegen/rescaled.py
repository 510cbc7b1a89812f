"""Sums of exp(x - max x) taken in the pass over the row that finds the maximum.

Each lane keeps the largest x so far and the sum below it; where a larger one comes, the sum
shrinks: one exponential an element. Milakov and Gimelshein, "Online normalizer calculation for
softmax", arXiv 1805.02867, algorithm 3.
"""

from __future__ import annotations

import torch

from iocompiler.codegen.kernel_writer import KernelWriter
from iocompiler.codegen.row_tile import tile
from iocompiler.tile.program import TileProgram


def maxima(program: TileProgram) -> dict[int, int]:
    """For each sum over the reduced axes of exp(x - max x), float32, the place of that maximum."""
    found = {}
    for position, op in enumerate(program.ops):
        if op.kind == "reduce" and op.fn == "sum" and op.over == "reduced":
            top = _maximum_below(program, op.inputs[0])
            if top is not None:
                found[position] = top
    return found


def _maximum_below(program: TileProgram, power: int) -> int | None:
    ops = program.ops
    if (ops[power].kind, ops[power].fn, ops[power].dtype) != ("map", "exp", torch.float32):
        return None
    difference = ops[ops[power].inputs[0]]
    if (difference.kind, difference.fn) != ("map", "sub"):
        return None
    value, top = difference.inputs
    maximum = ops[top]
    if (maximum.kind, maximum.fn, maximum.over) != ("reduce", "max", "reduced"):
        return None
    return top if maximum.inputs == (value,) and maximum.dtype == torch.float32 else None


def accumulate(writer: KernelWriter, position: int, top: int) -> None:
    """Take a piece of the row in; the maximum's own lanes do not hold it yet."""
    value = writer.full(writer.tensor(writer.program.ops[top].inputs[0]), tile(writer))
    value = writer.guarded(value, "max", torch.float32, ("r",))
    writer.line(f"acc_{position} = _rescaled(acc_{position}, acc_{top}, {value})")


def total(writer: KernelWriter, position: int, top: int) -> str:
    """The sum over the lanes, each brought below the row's maximum."""
    shrink = f"tl.exp(acc_{top} - {writer.value(top)})"
    return writer.folded("sum", f"acc_{position} * {shrink}", 1)
