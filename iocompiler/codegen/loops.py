"""Kernels with reductions along rows: the whole row at once, or in pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch

from iocompiler.codegen import expressions, moments, rescaled
from iocompiler.codegen.kernel_writer import KernelWriter
from iocompiler.codegen.row_tile import (
    ROW_POSITION,
    extremum,
    fold_tile,
    name_parallel,
    name_reduced,
    tile,
)
from iocompiler.tile.online import Online, levels, means, online
from iocompiler.tile.program import Op
from iocompiler.tile.traffic import VECTOR_BYTES

# --- the whole row in registers


def write_persistent(writer: KernelWriter) -> None:
    """Whole rows in registers: everything is loaded once."""
    name_parallel(writer, f"tl.program_id(0) * {writer.schedule.x_block}")
    name_reduced(writer)
    for position, op in enumerate(writer.program.ops):
        if op.kind == "reduce":
            fold_tile(writer, position, op)
        elif op.kind == "scan":
            _scan_tile(writer, position, op)
        else:
            writer.write(position)


def _scan_tile(writer: KernelWriter, position: int, op: Op) -> None:
    value = writer.full(writer.tensor(op.inputs[0]), tile(writer))
    name = f"{op.fn}_{position}"
    writer.line(f"{name} = tl.{op.fn}({value}, axis=1)")
    writer.names[f"%{position}"] = name


# --- the row in pieces


def write_looped(
    writer: KernelWriter, block: str = "tl.program_id(0)", masked: bool = True
) -> None:
    """One loop over the row for each level of reductions on reductions, but for those that go on in
    one (`tile/online.py`); each loads values again.

    ``block`` is the text of its number, ``masked`` False where its points are known to be there.
    """
    name_parallel(writer, f"{block} * {writer.schedule.x_block}", masked)
    program = writer.program
    beside = online(program)
    level = levels(program)
    along_r: list[bool] = []
    for position in range(len(program.ops)):
        along_r.append(_along_row(writer, position, along_r))
    last = max(
        (level[i] for i, op in enumerate(program.ops) if along_r[i] and op.kind == "store"),
        default=-1,
    )
    last = max(
        last,
        max((level[i] - 1 for i, op in enumerate(program.ops) if op.kind == "reduce"), default=0),
    )
    for number in range(last + 1):
        _write_settled(writer, level, along_r, number)
        _write_pass(writer, level, along_r, number, beside)
    _write_settled(writer, level, along_r, last + 1)


def _along_row(writer: KernelWriter, position: int, earlier: list[bool]) -> bool:
    """Whether a result differs along the row; that of a scan does, even over a constant."""
    op = writer.program.ops[position]
    if op.kind == "reduce":
        return False
    if op.kind == "scan" or any(earlier[r] for r in op.reads):
        return True
    return "r" in _row_spans(writer, position)


def _row_spans(writer: KernelWriter, position: int) -> set[str]:
    """Directions an operation's result varies over, by axes: they have no names yet."""
    reduced = {a.name for a in writer.program.reduced}
    spans = {"r"} if writer.program.varies[position] & reduced else set()
    op = writer.program.ops[position]
    if op.kind == "store":
        assert op.index is not None
        names = set(op.index.names) | writer.program.varies[op.inputs[0]]
        spans |= {"r"} if names & reduced else set()
    return spans


def _write_settled(
    writer: KernelWriter, level: list[int], along_r: list[bool], number: int
) -> None:
    """Write what no longer depends on the place in the row, once its reductions are done."""
    for position, op in enumerate(writer.program.ops):
        if along_r[position] or level[position] > number or op.kind == "reduce":
            continue
        if f"%{position}" in writer.names or (op.kind == "store" and level[position] != number):
            continue
        if all(f"%{r}" in writer.names for r in op.reads):
            writer.write(position)


def _write_pass(
    writer: KernelWriter,
    level: list[int],
    along_r: list[bool],
    number: int,
    beside: dict[int, Online],
) -> None:
    program = writer.program
    reductions = [i for i, op in enumerate(program.ops) if op.kind == "reduce"]
    folds = [i for i in reductions if level[i] == number + 1]
    stores = [
        i
        for i, op in enumerate(program.ops)
        if op.kind == "store" and along_r[i] and level[i] == number
    ]
    if not folds and not stores:
        return
    needed = _needed(writer, [i for i in folds if i not in beside] + stores, along_r)
    for position in folds:
        if position not in beside or beside[position].kind != "rests":
            _start_accumulator(writer, position)
    scans = [i for i in needed if program.ops[i].kind == "scan"]
    for position in scans:
        op = program.ops[position]
        start = "1" if op.fn == "cumprod" else "0"
        shape, kind = f"[{writer.schedule.x_block}, 1]", expressions.TYPES[op.dtype]
        writer.line(f"carry_{position} = tl.full({shape}, {start}, {kind})")
    outside = dict(writer.names)

    def piece(masked: bool) -> None:
        name_reduced(writer, "start", masked)
        for position in needed:
            if program.ops[position].kind == "scan":
                _scan_piece(writer, position)
            elif program.ops[position].kind != "reduce":
                writer.write(position)
        _take_in(writer, folds, beside)
        writer.names = dict(outside)

    _write_pieces(writer, piece)
    for position in folds:  # what another goes on beside stands before it
        _finish_accumulator(writer, position, beside)


def _take_in(writer: KernelWriter, folds: list[int], beside: dict[int, Online]) -> None:
    """Write how the lanes of each reduction take in a piece of the row."""
    mean_of = means(beside)
    squares = {its.beside: i for i, its in beside.items() if its.kind == "squares"}
    for position in folds:  # before the maximum's own lanes hold the piece
        if position in beside and beside[position].kind == "powers":
            rescaled.accumulate(writer, position, beside[position].beside)
    for position in folds:
        if position in mean_of:  # its lanes keep a mean instead
            moments.accumulate(writer, position, squares.get(position))
        elif position not in beside:
            _accumulate(writer, position)


def _write_pieces(writer: KernelWriter, piece: Callable[[bool], None]) -> None:
    """Write the loop over the pieces of a row. Where its end would keep even the whole pieces from
    moving 16 bytes at once (the mask of an odd length), the last piece stands for itself.
    """
    total, block = writer.points(writer.program.reduced), writer.schedule.r_block
    # elements may be of one byte
    odd = isinstance(total, int) and total % VECTOR_BYTES != 0 and total > block
    end = expressions.size(total // block * block if odd else total)
    writer.line(f"for start in {writer.steps(f'0, {end}, {block}')}:")
    writer.depth += 1
    piece(not odd)
    writer.depth -= 1
    if odd:
        writer.line(f"start = {end}")
        piece(True)


def _needed(writer: KernelWriter, targets: list[int], along_r: list[bool]) -> list[int]:
    """The row-dependent operations, in order, that the targets read, and the stores among them."""
    wanted: set[int] = set()
    stack = list(targets)
    while stack:
        position = stack.pop()
        for read in writer.program.ops[position].reads:
            if along_r[read] and read not in wanted:
                wanted.add(read)
                stack.append(read)
    stores = {t for t in targets if writer.program.ops[t].kind == "store"}
    return sorted(wanted | stores)


def _start_accumulator(writer: KernelWriter, position: int) -> None:
    op = writer.program.ops[position]
    dtype = _accumulator_dtype(writer, op)
    fn = op.fn.removeprefix("arg")
    neutral = writer.neutral(fn, dtype)
    kind = "tl.int32" if fn == "any" else expressions.TYPES[dtype]
    writer.line(f"acc_{position} = tl.full({tile(writer)}, {neutral}, {kind})")
    if op.fn != fn:
        writer.line(f"place_{position} = tl.full({tile(writer)}, {2**62}, tl.int64)")


def _accumulator_dtype(writer: KernelWriter, op: Op) -> torch.dtype:
    return writer.program.ops[op.inputs[0]].dtype


def _accumulate(writer: KernelWriter, position: int) -> None:
    op = writer.program.ops[position]
    value = writer.full(writer.tensor(op.inputs[0]), tile(writer))
    dtype = _accumulator_dtype(writer, op)
    acc = f"acc_{position}"
    if op.fn in ("argmax", "argmin"):
        fn = op.fn.removeprefix("arg")
        value = writer.guarded(value, fn, dtype, ("r",))
        place = f"place_{position}"
        here = writer.full(ROW_POSITION, tile(writer))
        writer.line(f"{acc}, {place} = {extremum(fn)}({acc}, {place}, {value}, {here})")
        return
    if op.fn == "any":
        value = f"({value}).to(tl.int32)"
        dtype = torch.int32
    writer.line(
        f"{acc} = {writer.combined(op.fn, acc, writer.guarded(value, op.fn, dtype, ('r',)))}"
    )


def _finish_accumulator(writer: KernelWriter, position: int, beside: dict[int, Online]) -> None:
    """Fold the lanes, each as it was kept."""
    op = writer.program.ops[position]
    name = f"{op.fn}_{position}"
    writer.names[f"%{position}"] = name
    mean_of = means(beside)
    if position in mean_of:
        moments.finish(writer, position, mean_of[position])
        return
    if position in beside:
        its = beside[position]
        total = rescaled.total if its.kind == "powers" else moments.total
        writer.line(f"{name} = {total(writer, position, its)}")
        return
    if op.fn in ("argmax", "argmin"):
        pair, fn = f"(acc_{position}, place_{position})", extremum(op.fn.removeprefix("arg"))
        writer.line(f"_, {name} = tl.reduce({pair}, 1, {fn}, keep_dims=True)")
        return
    writer.line(f"{name} = {writer.folded(op.fn, f'acc_{position}', 1)}")


def _scan_piece(writer: KernelWriter, position: int) -> None:
    op = writer.program.ops[position]
    value = writer.full(writer.tensor(op.inputs[0]), tile(writer))
    name, carry = f"{op.fn}_{position}", f"carry_{position}"
    fold = "prod" if op.fn == "cumprod" else "sum"
    combine = "*" if fold == "prod" else "+"
    inside = writer.guarded(value, fold, op.dtype, ("r",))
    writer.line(f"{name} = {carry} {combine} tl.{op.fn}({inside}, axis=1)")
    writer.line(f"{carry} = {carry} {combine} {writer.folded(fold, inside, 1)}")
    writer.names[f"%{position}"] = name
