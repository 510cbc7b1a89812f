"""Reductions with too few results to fill a device, cut into parts that a second program folds."""

from __future__ import annotations

from dataclasses import replace

import torch

from iocompiler.tile.arrange import merge_axes
from iocompiler.tile.index import Affine, Axis, Size, ceil_div, product, row_major
from iocompiler.tile.online import means, online
from iocompiler.tile.ops import REDUCES
from iocompiler.tile.parts import after_reductions, between, together
from iocompiler.tile.program import Buffer, Builder, Op, TileProgram, drop_dead

_FOLDABLE = {"sum", "max", "min", "prod", "any"}
# Where all parts have to have one size.
_FEWEST_PARTS, _MOST_PARTS = 16, 1024


def split_reduction(program: TileProgram, parts: int) -> tuple[TileProgram, TileProgram] | None:
    """(partial program, folding program), or None where the reduction cannot be cut.

    The first has a new outermost parallel axis of about ``parts`` points, each reducing one run
    of the outermost reduced axis into a row of the buffers "partial0", ...; the second folds the
    rows and does what came after.
    """
    program = merge_axes(program)
    if parts < 2 or not can_split(program):
        return None
    axis = program.reduced[0]
    parts = _equal_parts(axis.size, parts) if online(program) else _near_divisor(axis.size, parts)
    if parts < 2:
        return None
    folds = [i for i, op in enumerate(program.ops) if op.kind == "reduce"]
    points = product([a.size for a in program.parallel])
    partials = [
        Buffer(f"partial{n}", program.ops[i].dtype, "out", points * parts)
        for n, i in enumerate(folds)
    ]
    return _first(program, axis, parts, folds, partials), _second(
        program, parts, folds, partials, points
    )


def can_split(program: TileProgram) -> bool:
    """Whether its reductions can be cut into parts: nothing along them waits for their results, but
    for reductions that go on beside another (`tile/online.py`), of parts of one size.
    """
    if not program.reduced:
        return False
    after = after_reductions(program)
    beside = online(program)
    reduced = {a.name for a in program.reduced}
    if beside and _equal_parts(program.reduced[0].size, _MOST_PARTS) < 2:
        return False
    for position, op in enumerate(program.ops):
        if op.kind == "scan" or op.fn == "atomic_add":
            return False
        if op.kind == "reduce" and (
            op.over != "reduced"
            or op.fn not in _FOLDABLE
            or (after[op.inputs[0]] and position not in beside)
        ):
            return False
        if op.kind == "store" and after[position] and program.varies[position] & reduced:
            return False
    return any(op.kind == "reduce" for op in program.ops)


def _near_divisor(size: Size, parts: int) -> int:
    """A divisor of the size not far below ``parts``, which needs no mask; else ``parts``."""
    if not isinstance(size, int):
        return parts
    parts = min(parts, size)
    return next((p for p in range(parts, parts // 2, -1) if size % p == 0), parts)


def _equal_parts(size: Size, parts: int) -> int:
    """The number of parts of one size nearest to ``parts``; 1 where there would be too few, or the
    size is a symbol.
    """
    if not isinstance(size, int):
        return 1
    found = [p for p in range(2, min(size, _MOST_PARTS) + 1) if size % p == 0]
    if not found or found[-1] < min(size, _FEWEST_PARTS):
        return 1
    return min(found, key=lambda p: max(p, parts) / min(p, parts))


def _first(
    program: TileProgram, axis: Axis, parts: int, folds: list[int], partials: list[Buffer]
) -> TileProgram:
    chunk = ceil_div(axis.size, parts)
    whole = isinstance(axis.size, int) and axis.size % parts == 0
    place = Affine.of("s") * chunk + Affine.of(axis.name)
    beside = online(program)
    mean_of, kept = means(beside), between(program, beside)
    build = Builder()
    inside = None if whole else _below(build, place, axis.size)
    moved: dict[int, int] = {}
    row = row_major((Axis("s", parts), *program.parallel))
    for position, op in enumerate(program.ops):
        if position in folds:
            value = moved[op.inputs[0]]
            if inside is not None:
                value = _guard(build, inside, value, op.fn)
            moved[position] = result = build.add(Op("reduce", op.dtype, (value,), op.fn))
            if position in mean_of:
                count = build.const(_points_of_a_part(program, parts), op.dtype)
                moved[mean_of[position]] = result = build.map("div", result, count)
            build.store(partials[folds.index(position)].name, row, result)
        elif position in kept:
            moved[position] = _move(build, op, moved, {axis.name: place}, inside)
    rest = tuple(replace(a, size=chunk) if a is axis else a for a in program.reduced)
    return build.program(
        (Axis("s", parts), *program.parallel), rest, program.buffers + tuple(partials)
    )


def _points_of_a_part(program: TileProgram, parts: int) -> Size:
    """Elements that one part folds; where means are taken all parts have as many."""
    first, *rest = program.reduced
    return product([ceil_div(first.size, parts), *(a.size for a in rest)])


def _below(build: Builder, place: Affine, size: Size) -> int:
    return build.map("lt", build.iota(place), build.const(size, torch.int64), dtype=torch.bool)


def _guard(build: Builder, inside: int, value: int, fn: str) -> int:
    dtype = build.dtype(value)
    neutral = build.const(REDUCES[fn].neutral(dtype), dtype)
    return build.map("where", inside, value, neutral, dtype=dtype)


def _move(
    build: Builder, op: Op, moved: dict[int, int], places: dict[str, Affine], inside: int | None
) -> int:
    index = op.index
    touched = False
    if index is not None:
        touched = any(name in places for name in index.names) or bool(index.values)
        index = index.substitute(
            places | {f"%{v}": Affine.of(f"%{moved[v]}") for v in index.values}
        )
    inputs = tuple(moved[i] for i in op.inputs)
    if inside is not None and touched and op.kind in ("load", "store"):
        plain = 1 if op.kind == "load" else 2
        mask = (
            inside
            if len(inputs) < plain
            else build.map("and", inputs[-1], inside, dtype=torch.bool)
        )
        inputs = (*inputs[: plain - 1], mask)
    return build.add(replace(op, inputs=inputs, index=index))


def _second(
    program: TileProgram, parts: int, folds: list[int], partials: list[Buffer], points: Size
) -> TileProgram:
    after, beside = after_reductions(program), online(program)
    mean_of = means(beside)
    reduced = {a.name for a in program.reduced}
    names = {a.name: Affine.of(f"x{i}") for i, a in enumerate(program.parallel)}
    parallel = tuple(Axis(f"x{i}", a.size) for i, a in enumerate(program.parallel))
    row = row_major(parallel) + Affine.of("r0") * points
    build = Builder()
    found = {
        position: build.load(buffer.name, row, buffer.dtype)
        for position, buffer in zip(folds, partials, strict=True)
    }
    moved: dict[int, int] = {}
    for position, op in enumerate(program.ops):
        if position in folds:
            value = found[position]
            if position in beside:
                each = _points_of_a_part(program, parts)
                value = together(build, position, beside, found, moved, each)
            moved[position] = build.add(Op("reduce", op.dtype, (value,), op.fn))
            if position in mean_of:  # of means
                count = build.const(parts, op.dtype)
                moved[mean_of[position]] = build.map("div", moved[position], count)
        elif program.varies[position] & reduced or any(r not in moved for r in op.reads):
            continue
        elif position not in moved and (
            op.kind != "store" or after[position] or not _along(op, reduced)
        ):
            moved[position] = _move(build, op, moved, names, None)
    buffers = program.buffers + tuple(replace(b, role="in") for b in partials)
    return drop_dead(build.program(parallel, (Axis("r0", parts),), buffers))


def _along(op: Op, reduced: set[str]) -> bool:
    return op.index is not None and bool(set(op.index.names) & reduced)
