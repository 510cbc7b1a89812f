"""Pointwise programs that ignore shape: every element by itself, in memory order.

Such programs over tensors of different sizes are one program over ``x0 < n``, which is what lets
one launch serve many tensors (an optimizer step).
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from iocompiler.tile.index import Affine, Axis, Size, product, row_major
from iocompiler.tile.program import TileProgram

LENGTH = sympy.Symbol("n", integer=True, positive=True)


def flat_program(program: TileProgram) -> tuple[TileProgram, Size] | None:
    """The program over one axis of `LENGTH` points, and that length; None if a place matters.

    Every access must be to the point's own row-major position or to the one element of a tensor
    that has no more.
    """
    placed = ("iota", "rand", "scan", "reduce")
    if program.reduced or any(op.kind in placed for op in program.ops):
        return None
    position = row_major(program.parallel)
    ops = []
    for op in program.ops:
        index = op.index
        if index is not None and index.const != 0:
            return None
        if index is not None and index.terms:
            if index.terms != position.terms:
                return None
            index = Affine.of("x0")
        ops.append(replace(op, index=index))
    points = product([a.size for a in program.parallel])
    swept = {op.buffer for op in ops if op.index is not None and op.index.terms}
    if any(b.elements != points for b in program.buffers if b.name in swept):
        return None
    buffers = tuple(replace(b, elements=LENGTH if b.name in swept else 1) for b in program.buffers)
    return TileProgram((Axis("x0", LENGTH),), (), buffers, tuple(ops)), points
