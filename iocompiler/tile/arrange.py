"""The axes of a program as a kernel walks them: merged where accesses allow, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from iocompiler.tile.index import Affine, Axis, Size
from iocompiler.tile.program import Op, TileProgram


def merge_axes(program: TileProgram) -> TileProgram:
    """The same program over as few axes as its accesses allow.

    Axes of one point go; points are walked in the order in which they lie in memory, where all
    accesses agree about that. Adjacent axes (outer, inner) become one where every index has
    coefficient(outer) == coefficient(inner) * size(inner): a point of the pair is then one number.
    """
    program = _in_memory_order(_without_points(program))
    changed = True
    while changed:
        changed = False
        for axes in (program.parallel, program.reduced):
            for outer, inner in pairwise(axes):
                if _mergeable(program, outer, inner):
                    program = _merged(program, outer, inner)
                    changed = True
                    break
            if changed:
                break
    return program


def _in_memory_order(program: TileProgram) -> TileProgram:
    """A program without reductions, its axes in the order in which everything lies that varies over
    all of them, the farthest apart first: programs side by side then read side by side.
    """
    if program.reduced:
        return program
    axes = {axis.name: axis for axis in program.parallel}
    indices = [op.index for op in program.ops if op.index is not None]
    orders = {_order(index) for index in indices if axes.keys() == set(index.axes)}
    order = orders.pop() if len(orders) == 1 else None
    if order is None:
        return program
    return replace(program, parallel=tuple(axes[name] for name in order))


def _order(index: Affine) -> tuple[str, ...] | None:
    """The axes by their strides, the largest first; None where these are not known to differ."""
    strides = {name: index.coefficient(name) for name in index.axes}
    known = {name: size for name, size in strides.items() if isinstance(size, int) and size > 0}
    if len(set(known.values())) < len(strides):
        return None
    return tuple(sorted(known, key=lambda name: -known[name]))


def _mergeable(program: TileProgram, outer: Axis, inner: Axis) -> bool:
    return all(
        op.index is None
        or op.index.coefficient(outer.name) == op.index.coefficient(inner.name) * inner.size
        for op in program.ops
    )


def _merged(program: TileProgram, outer: Axis, inner: Axis) -> TileProgram:
    # the merged axis takes the inner one's name: its coefficients stand already
    rename = {outer.name: Affine()}
    axis = Axis(inner.name, outer.size * inner.size)
    return _with(program, {inner.name: axis}, {outer.name}, rename)


def _without_points(program: TileProgram) -> TileProgram:
    points = {a.name for a in program.axes if a.size == 1}
    if not points:
        return program
    keep_one = {a.name for a in program.reduced} <= points and program.reduced
    dropped = points - ({program.reduced[-1].name} if keep_one else set())
    return _with(program, {}, dropped, {name: Affine() for name in points})


def _with(
    program: TileProgram, changed: dict[str, Axis], dropped: set[str], rename: dict[str, Affine]
) -> TileProgram:
    def axes(old: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return tuple(changed.get(a.name, a) for a in old if a.name not in dropped)

    ops = tuple(_reindexed(op, rename) for op in program.ops)
    return TileProgram(axes(program.parallel), axes(program.reduced), program.buffers, ops)


def _reindexed(op: Op, rename: dict[str, Affine]) -> Op:
    if op.index is None:
        return op
    return Op(
        op.kind,
        op.dtype,
        op.inputs,
        op.fn,
        op.buffer,
        op.index.substitute(rename),
        op.value,
        op.over,
    )


@dataclass(frozen=True)
class Accesses:
    """How many accesses of a program run contiguously along each axis; or none: ``scattered``."""

    along: dict[str, int]
    scattered: int


def contiguity(program: TileProgram) -> Accesses:
    """Count loads and stores by the axis along which neighbouring points are neighbouring elements.

    Only those that vary over as many axes as the widest count: they carry the bytes.
    """
    widest = max((len(_axes_of(op)) for op in _memory(program)), default=0)
    along: dict[str, int] = {}
    scattered = 0
    for op in _memory(program):
        names = _axes_of(op)
        if len(names) < widest:
            continue
        unit = [n for n in names if op.index is not None and op.index.coefficient(n) == 1]
        if unit:
            along[unit[0]] = along.get(unit[0], 0) + (2 if op.kind == "store" else 1)
        elif names:
            scattered += 1
    return Accesses(along, scattered)


def _memory(program: TileProgram) -> list[Op]:
    return [op for op in program.ops if op.kind in ("load", "store")]


def _axes_of(op: Op) -> tuple[str, ...]:
    return op.index.axes if op.index is not None else ()


@dataclass(frozen=True)
class Tiling:
    """Which axes a tile spans; ``grid`` axes are fixed, ``y`` is None in one dimension."""

    grid: tuple[Axis, ...]
    y: Axis | None
    x: tuple[Axis, ...]


def pointwise_tiling(program: TileProgram) -> Tiling:
    """Tile axes of a merged program without reductions.

    Where all accesses run along the innermost axis, the points are one long row. Where
    some run along another axis (a transpose), the tile is square over the two, and both
    directions are read in whole lines.
    """
    axes = program.parallel
    if len(axes) < 2:
        return Tiling((), None, axes)
    along = contiguity(program).along
    ranked = sorted(along, key=lambda n: -along[n])
    inner = ranked[0] if ranked else axes[-1].name
    others = [n for n in ranked[1:] if _size(axes, n) != 1]
    if not others and inner == axes[-1].name:
        return Tiling((), None, axes)
    x = next(a for a in axes if a.name == inner)
    second = others[0] if others else axes[-1].name
    y = next(a for a in axes if a.name == second)
    return Tiling(tuple(a for a in axes if a.name not in (inner, second)), y, (x,))


def _size(axes: tuple[Axis, ...], name: str) -> Size:
    return next(a.size for a in axes if a.name == name)


def rows_contiguous(program: TileProgram) -> bool:
    """Whether reductions read memory along the reduced axes (rows), not across them (columns)."""
    along = contiguity(program).along
    reduced = {a.name for a in program.reduced}
    inside = sum(count for name, count in along.items() if name in reduced)
    return inside * 2 >= sum(along.values())
