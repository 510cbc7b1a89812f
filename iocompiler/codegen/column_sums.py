"""Kernels with reductions both ways: many rows a program, with sums down the columns."""

from __future__ import annotations

import torch

from iocompiler.codegen import expressions
from iocompiler.codegen.kernel_writer import KernelWriter
from iocompiler.codegen.row_tile import fold_tile, name_parallel, name_reduced, tile
from iocompiler.tile.program import Op
from iocompiler.tile.rows import reads_again

_LANES = 32
_MOST_REGISTERS = 255
_REGISTERS_OF_AN_SM = 1 << 16
_ROWS_HELD = 4


def write_rows(writer: KernelWriter) -> None:
    """Each program walks its share of the rows; column sums stay in registers until it ends."""
    program, block = writer.program, writer.schedule.x_block
    columns = [
        i for i, op in enumerate(program.ops) if op.kind == "reduce" and op.over == "parallel"
    ]
    partial = {i for i, op in enumerate(program.ops) if op.kind == "store" and op.fn == "partial"}
    name_reduced(writer)
    for position in columns:
        dtype = program.ops[position].dtype
        kind = "tl.int32" if program.ops[position].fn == "any" else expressions.TYPES[dtype]
        neutral = writer.neutral(program.ops[position].fn, dtype)
        writer.line(f"acc_{position} = tl.full({tile(writer)}, {neutral}, {kind})")
    by_row = {a.name for a in program.parallel}
    fixed = [
        not (program.varies[i] & by_row) and not _after(program.ops, i, columns)
        for i in range(len(program.ops))
    ]
    again = reads_again(program)
    held = not again and _has_registers_to_spare(writer)
    for position, op in enumerate(program.ops):
        settled = fixed[position] and (held or not program.varies[position])
        settled = settled and all(f"%{read}" in writer.names for read in op.reads)
        if settled and op.kind not in ("store", "reduce"):
            writer.write(position)
    total = expressions.size(writer.points(program.parallel))
    step = writer.schedule.programs * block
    bounds = f"tl.program_id(0) * {block}, {total}, {step}"
    writer.line(f"for first in {writer.steps(bounds)}:")
    writer.depth += 1
    name_parallel(writer, "first")
    if again:
        _write_passes(writer, columns, partial)
    else:
        _write_pass(writer, columns, partial)
    writer.depth -= 1
    for position in sorted(partial):
        _store_partial(writer, position)


def _write_pass(writer: KernelWriter, columns: list[int], partial: set[int]) -> None:
    """A row is loaded once and stays in registers."""
    for position, op in enumerate(writer.program.ops):
        if position in columns:
            _accumulate_column(writer, position)
        elif op.kind == "reduce":
            fold_tile(writer, position, op)
        elif position not in partial and f"%{position}" not in writer.names:
            writer.write(position)


def _write_passes(writer: KernelWriter, columns: list[int], partial: set[int]) -> None:
    """A row is loaded for each level of its reductions, and for the rest: not from memory, but from
    a cache, and registers hold little of it while the reductions are under way. All is loaded
    before any of it is stored, which may be in its place.
    """
    ops = writer.program.ops
    along = {i for i, op in enumerate(ops) if op.kind == "reduce"} - set(columns)
    level: list[int] = []
    for position, op in enumerate(ops):
        level.append(max((level[read] for read in op.reads), default=0) + (position in along))
    for number in sorted({level[position] for position in along}):
        folds = [position for position in sorted(along) if level[position] == number]
        _write_needed(writer, folds)  # a fold waits for all warps: no load comes after it
        for position in folds:
            fold_tile(writer, position, ops[position])
        for position in range(len(ops)):
            if "r" in writer.spans(position):
                writer.names.pop(f"%{position}", None)
        writer.readings += 1
    for position in columns:
        _write_needed(writer, [position])
        _accumulate_column(writer, position)
    stores = [i for i, op in enumerate(ops) if op.kind == "store" and i not in partial]
    _write_needed(writer, stores)
    for position in stores:
        writer.write(position)


def _write_needed(writer: KernelWriter, targets: list[int]) -> None:
    """Write what the targets read and has no name."""
    wanted, waiting = set[int](), list(targets)
    while waiting:
        for read in writer.program.ops[waiting.pop()].reads:
            if read not in wanted and f"%{read}" not in writer.names:
                wanted.add(read)
                waiting.append(read)
    for position in sorted(wanted):
        writer.write(position)


def _has_registers_to_spare(writer: KernelWriter) -> bool:
    """Whether a program can keep what is the same for every row (weights) beside its sums, the row
    and the row's gradient; else each row reads it again, from L2.
    """
    schedule = writer.schedule
    if schedule.num_stages < 3:
        return True  # nothing is in flight: a row would wait for its weights
    each = schedule.x_block * schedule.r_block / (_LANES * schedule.num_warps)
    most = min(_MOST_REGISTERS, _REGISTERS_OF_AN_SM // (_LANES * schedule.num_warps))
    return _ROWS_HELD * each < most


def _after(ops: tuple[Op, ...], position: int, columns: list[int]) -> bool:
    reached = set(columns)
    for place, op in enumerate(ops[: position + 1]):
        if any(r in reached for r in op.reads):
            reached.add(place)
    return position in reached


def _accumulate_column(writer: KernelWriter, position: int) -> None:
    op = writer.program.ops[position]
    dtype = writer.program.ops[op.inputs[0]].dtype
    value = writer.full(writer.tensor(op.inputs[0]), tile(writer))
    if op.fn == "any":
        value, dtype = f"({value}).to(tl.int32)", torch.int32
    acc = f"acc_{position}"
    writer.line(
        f"{acc} = {writer.combined(op.fn, acc, writer.guarded(value, op.fn, dtype, ('x',)))}"
    )
    writer.names[f"%{position}"] = acc


def _store_partial(writer: KernelWriter, position: int) -> None:
    op = writer.program.ops[position]
    assert op.index is not None
    column = writer.program.ops[op.inputs[0]]
    share = writer.program.buffer(op.buffer).elements // writer.schedule.programs
    total = writer.folded(column.fn, f"acc_{op.inputs[0]}", 0)
    address = writer.tile_of(f"({expressions.affine(op.index, writer.names)})", op.index)
    mask = f", {writer.masks['r']}" if "r" in writer.masks else ""
    writer.line(
        f"tl.store({op.buffer}_ptr + tl.program_id(0) * {share} + {address}, {total}{mask})"
    )
