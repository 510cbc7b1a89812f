"""Sums of exp(x - max x) taken in the pass over the row that finds the maximum.

Each lane keeps the largest x so far and the sum below it; where a larger one comes, the sum
shrinks: one exponential an element. Milakov and Gimelshein, "Online normalizer calculation for
softmax", arXiv 1805.02867, algorithm 3.
"""

from __future__ import annotations

import torch

from iocompiler.codegen.kernel_writer import KernelWriter
from iocompiler.codegen.row_tile import tile
from iocompiler.tile.online import Online


def accumulate(writer: KernelWriter, position: int, top: int) -> None:
    """Take a piece of the row in; the maximum's own lanes do not hold it yet."""
    value = writer.full(writer.tensor(writer.program.ops[top].inputs[0]), tile(writer))
    value = writer.guarded(value, "max", torch.float32, ("r",))
    writer.line(f"acc_{position} = _rescaled(acc_{position}, acc_{top}, {value})")


def total(writer: KernelWriter, position: int, powers: Online) -> str:
    """The sum over the lanes, each brought below the row's maximum; below 0 where that is infinite,
    if the program says so.
    """
    top = writer.value(powers.beside)
    guarded = powers.against != powers.beside
    below = f"tl.where(tl.abs({top}) == float('inf'), 0.0, {top})" if guarded else top
    shrink = f"tl.exp(acc_{powers.beside} - {below})"
    found = writer.folded("sum", f"acc_{position} * {shrink}", 1)
    return f"tl.where({top} == float('inf'), {top}, {found})" if guarded else found
