"""Programs that ignore shape, so that one launch serves many tensors.

Pointwise ones (an optimizer step), every element by itself in memory order, over tensors of
different sizes are one program over ``x0 < n``. The second half of a split reduction
(`tile/split.py`, `tile/rows.py`), which folds the rows of partial results, is one over ``x0 < n``
and ``r0 < p``; what it finishes for several results at once is as many programs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import sympy

from iocompiler.tile.index import Affine, Axis, Size, product, row_major
from iocompiler.tile.program import Buffer, Op, TileProgram, drop_dead

LENGTH = sympy.Symbol("n", integer=True, positive=True)
PARTS = sympy.Symbol("p", integer=True, positive=True)

_FOLDED = ("sum", "max", "min", "prod", "any")


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


def is_flat(program: TileProgram) -> bool:
    """Whether it is a flat program that reduces nothing, over tensors of any length."""
    return not program.reduced and [axis.size for axis in program.parallel] == [LENGTH]


@dataclass(frozen=True)
class Fold:
    """What a folding program computes of one set of partial rows.

    ``program`` is over `LENGTH` columns and `PARTS` rows, which are ``length`` and ``parts``;
    ``buffers`` are the names of its buffers in the whole program, whose ``stores`` it does.
    """

    program: TileProgram
    length: Size
    parts: Size
    buffers: tuple[str, ...]
    stores: tuple[int, ...]


@lru_cache(maxsize=1024)
def folds(program: TileProgram) -> tuple[Fold, ...]:
    """The folds a program consists of; none where it is another program.

    Every access must be to the row-major position of the column, in each row of partial results or
    in one; or to the one element of a tensor that has no more.
    """
    if len(program.reduced) != 1 or any(not _plain(op) for op in program.ops):
        return ()
    parted = [_flat_fold(_only(program, stores), stores) for stores in _independent(program)]
    return tuple(fold for fold in parted if fold is not None) if all(parted) else ()


def without(program: TileProgram, stores: tuple[int, ...]) -> TileProgram:
    """The program without some of its stores, and without what only they need."""
    ops = tuple(
        Op("const", op.dtype) if position in stores else op
        for position, op in enumerate(program.ops)
    )
    return drop_dead(replace(program, ops=ops))


def _plain(op: Op) -> bool:
    if op.kind == "reduce":
        return op.over == "reduced" and op.fn in _FOLDED
    return op.kind in ("load", "const", "map", "cast") or (op.kind == "store" and not op.fn)


def _independent(program: TileProgram) -> list[tuple[int, ...]]:
    """The stores, those together that need one reduction or read the same rows."""
    groups: list[tuple[set[int], set[int]]] = []
    for position, op in enumerate(program.ops):
        if op.kind != "store":
            continue
        stores, needed = {position}, _rows_read(program, position)
        for other in [group for group in groups if group[1] & needed]:
            groups.remove(other)
            stores, needed = stores | other[0], needed | other[1]
        groups.append((stores, needed))
    return [tuple(sorted(stores)) for stores, _ in groups]


def _rows_read(program: TileProgram, position: int) -> set[int]:
    """The loads along the reduced axis that a store needs, and the reductions."""
    reduced = {axis.name for axis in program.reduced}
    found, waiting = set[int](), [position]
    while waiting:
        at = waiting.pop()
        op = program.ops[at]
        if op.kind == "reduce" or (op.kind == "load" and program.varies[at] & reduced):
            found.add(at)
        waiting += op.reads
    return found


def _only(program: TileProgram, stores: tuple[int, ...]) -> TileProgram:
    others = [i for i, op in enumerate(program.ops) if op.kind == "store" and i not in stores]
    return without(program, tuple(others))


def _flat_fold(program: TileProgram, stores: tuple[int, ...]) -> Fold | None:
    (rows,) = program.reduced
    points, position = product([a.size for a in program.parallel]), row_major(program.parallel)
    kinds = {
        (): (Affine(), 1, 1),
        position.terms: (Affine.of("x0"), LENGTH, points),
        (position + Affine.of(rows.name) * points).terms: (
            Affine.of("x0") + Affine.of("r0") * LENGTH,
            LENGTH * PARTS,
            points * rows.size,
        ),
    }
    ops, elements, names = [], dict[str, Size](), dict[str, str]()
    for at, op in enumerate(program.ops):
        if op.index is None:
            ops.append(op)
            continue
        one = not op.index.terms and op.kind == "load"
        found = kinds[()] if one else kinds.get(op.index.terms)
        if op.index.const != 0 or found is None or (op.kind == "store" and found[1] == 1):
            return None
        if op.kind == "store" and program.varies[at] & {rows.name}:
            return None
        index, size, expected = found
        if program.buffer(op.buffer).elements != expected:
            return None
        name = names.setdefault(op.buffer, f"b{len(names)}")
        if elements.setdefault(name, size) != size:
            return None
        ops.append(replace(op, index=index, buffer=name))
    whole = {b.name: b for b in program.buffers}
    buffers = tuple(
        Buffer(new, whole[old].dtype, whole[old].role, elements[new]) for old, new in names.items()
    )
    axes = (Axis("x0", LENGTH),), (Axis("r0", PARTS),)
    return Fold(TileProgram(*axes, buffers, tuple(ops)), points, rows.size, tuple(names), stores)
