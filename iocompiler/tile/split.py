"""Reductions with too few results to fill a device, cut into parts that a second program folds."""

from __future__ import annotations

from dataclasses import replace

import torch

from iocompiler.tile.arrange import merge_axes
from iocompiler.tile.index import Affine, Axis, Size, ceil_div, product, row_major
from iocompiler.tile.ops import REDUCES
from iocompiler.tile.program import Buffer, Builder, Op, TileProgram, drop_dead

_FOLDABLE = {"sum", "max", "min", "prod", "any"}


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
    parts = _near_divisor(axis.size, parts)
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
    """Whether its reductions can be cut into parts: nothing along them waits for their results."""
    after = _after_reductions(program)
    reduced = {a.name for a in program.reduced}
    for position, op in enumerate(program.ops):
        if op.kind == "scan" or op.fn == "atomic_add":
            return False
        if op.kind == "reduce" and (
            op.over != "reduced" or op.fn not in _FOLDABLE or after[op.inputs[0]]
        ):
            return False
        if op.kind == "store" and after[position] and program.varies[position] & reduced:
            return False
    return bool(program.reduced) and any(op.kind == "reduce" for op in program.ops)


def _after_reductions(program: TileProgram) -> list[bool]:
    found: list[bool] = []
    for op in program.ops:
        found.append(op.kind == "reduce" or any(found[r] for r in op.reads))
    return found


def _near_divisor(size: Size, parts: int) -> int:
    """A divisor of the size not far below ``parts``, which needs no mask; else ``parts``."""
    if not isinstance(size, int):
        return parts
    parts = min(parts, size)
    return next((p for p in range(parts, parts // 2, -1) if size % p == 0), parts)


def _first(
    program: TileProgram, axis: Axis, parts: int, folds: list[int], partials: list[Buffer]
) -> TileProgram:
    chunk = ceil_div(axis.size, parts)
    whole = isinstance(axis.size, int) and axis.size % parts == 0
    place = Affine.of("s") * chunk + Affine.of(axis.name)
    after = _after_reductions(program)
    build = Builder()
    inside = None if whole else _below(build, place, axis.size)
    moved: dict[int, int] = {}
    reduced = {a.name for a in program.reduced}
    row = row_major((Axis("s", parts), *program.parallel))
    for position, op in enumerate(program.ops):
        if position in folds:
            value = moved[op.inputs[0]]
            if inside is not None:
                value = _guard(build, inside, value, op.fn)
            result = build.add(Op("reduce", op.dtype, (value,), op.fn))
            build.store(partials[folds.index(position)].name, row, result)
            moved[position] = result
        elif after[position] or (op.kind == "store" and not program.varies[position] & reduced):
            continue
        else:
            moved[position] = _move(build, op, moved, {axis.name: place}, inside)
    rest = tuple(replace(a, size=chunk) if a is axis else a for a in program.reduced)
    return build.program(
        (Axis("s", parts), *program.parallel), rest, program.buffers + tuple(partials)
    )


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
    after = _after_reductions(program)
    reduced = {a.name for a in program.reduced}
    names = {a.name: Affine.of(f"x{i}") for i, a in enumerate(program.parallel)}
    parallel = tuple(Axis(f"x{i}", a.size) for i, a in enumerate(program.parallel))
    row = row_major(parallel)
    build = Builder()
    moved: dict[int, int] = {}
    for position, op in enumerate(program.ops):
        if position in folds:
            buffer = partials[folds.index(position)]
            value = build.load(buffer.name, row + Affine.of("r0") * points, buffer.dtype)
            moved[position] = build.add(Op("reduce", op.dtype, (value,), op.fn))
        elif program.varies[position] & reduced or any(r not in moved for r in op.reads):
            continue
        elif op.kind != "store" or after[position] or not _along(op, reduced):
            moved[position] = _move(build, op, moved, names, None)
    buffers = program.buffers + tuple(replace(b, role="in") for b in partials)
    return drop_dead(build.program(parallel, (Axis("r0", parts),), buffers))


def _along(op: Op, reduced: set[str]) -> bool:
    return op.index is not None and bool(set(op.index.names) & reduced)
