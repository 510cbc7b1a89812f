"""Kernels with reductions: the whole row at once, in pieces, or many
rows a program with column sums.
"""

from __future__ import annotations

import torch

from iocompiler.codegen import expressions
from iocompiler.codegen.kernel_writer import KernelWriter
from iocompiler.tile.program import Op


def _open(writer: KernelWriter, x_position: str) -> None:
    """Name the parallel axes; in a kernel with reductions they run down the tile."""
    block = writer.schedule.x_block
    total = writer.points(writer.program.parallel)
    writer.line(f"x = {x_position} * {block} + tl.arange(0, {block})[:, None]")
    writer.bounded("x", "x", total, block)
    writer.flat_axes(writer.program.parallel, "x", "x")


def _row(writer: KernelWriter, offset: str) -> None:
    block = writer.schedule.r_block
    writer.line(f"r = {offset}tl.arange(0, {block})[None, :]")
    writer.bounded("r", "r", writer.points(writer.program.reduced), block)
    writer.flat_axes(writer.program.reduced, "r", "r")


def _tile(writer: KernelWriter) -> str:
    return f"[{writer.schedule.x_block}, {writer.schedule.r_block}]"


# --- the whole row in registers


def write_persistent(writer: KernelWriter) -> None:
    _open(writer, "tl.program_id(0)")
    _row(writer, "")
    for position, op in enumerate(writer.program.ops):
        if op.kind == "reduce":
            _fold_tile(writer, position, op)
        elif op.kind == "scan":
            _scan_tile(writer, position, op)
        else:
            writer.write(position)


def _fold_tile(writer: KernelWriter, position: int, op: Op) -> None:
    value = writer.full(writer._tensor(op.inputs[0]), _tile(writer))
    name = f"{op.fn}_{position}"
    writer.names[f"%{position}"] = name
    dtype = writer.program.ops[op.inputs[0]].dtype
    if op.fn in ("argmax", "argmin"):
        fn = op.fn.removeprefix("arg")
        value = writer.guarded(value, fn, dtype, ("r",))
        place = writer.full(f"({_row_position(writer)})", _tile(writer))
        writer.line(f"_, {name} = tl.reduce(({value}, {place}), 1, {_pair(fn)}, keep_dims=True)")
        return
    writer.line(
        f"{name} = {writer.folded(op.fn, writer.guarded(value, op.fn, dtype, ('r',)), 1, dtype)}"
    )


def _pair(fn: str) -> str:
    return {"max": "_later_maximum", "min": "_later_minimum"}[fn]


def _row_position(writer: KernelWriter) -> str:
    return "r.to(tl.int64)"


def _scan_tile(writer: KernelWriter, position: int, op: Op) -> None:
    value = writer.full(writer._tensor(op.inputs[0]), _tile(writer))
    name = f"{op.fn}_{position}"
    writer.line(f"{name} = tl.{op.fn}({value}, axis=1)")
    writer.names[f"%{position}"] = name


# --- the row in pieces


def write_looped(writer: KernelWriter) -> None:
    """One loop over the row for every level of reductions that need earlier ones;
    values are loaded again in each.
    """
    _open(writer, "tl.program_id(0)")
    program = writer.program
    level = _levels(writer)
    along_r: list[bool] = []
    for position in range(len(program.ops)):
        along_r.append(_along_row(writer, position, along_r))
    last = max(
        (level[i] for i, op in enumerate(program.ops) if along_r[i] and op.kind == "store"),
        default=-1,
    )
    last = max(
        last, max((level[op.inputs[0]] for op in program.ops if op.kind == "reduce"), default=0)
    )
    for number in range(last + 1):
        _write_settled(writer, level, along_r, number)
        _write_pass(writer, level, along_r, number)
    _write_settled(writer, level, along_r, last + 1)


def _along_row(writer: KernelWriter, position: int, earlier: list[bool]) -> bool:
    """Whether a result differs from place to place in the row; that of a
    scan does, even over a constant.
    """
    op = writer.program.ops[position]
    if op.kind == "reduce":
        return False
    if op.kind == "scan" or any(earlier[r] for r in op.reads):
        return True
    return "r" in _row_spans(writer, position)


def _row_spans(writer: KernelWriter, position: int) -> set[str]:
    """Directions an operation's result varies over, by the program's
    axes (names are not yet given).
    """
    reduced = {a.name for a in writer.program.reduced}
    spans = {"r"} if writer.program.varies[position] & reduced else set()
    op = writer.program.ops[position]
    if op.kind == "store":
        assert op.index is not None
        names = set(op.index.names) | writer.program.varies[op.inputs[0]]
        spans |= {"r"} if names & reduced else set()
    return spans


def _levels(writer: KernelWriter) -> list[int]:
    """For each operation, how many loops over the row must be done before it can be computed."""
    found: list[int] = []
    for op in writer.program.ops:
        level = max((found[r] for r in op.reads), default=0)
        found.append(level + 1 if op.kind == "reduce" else level)
    return found


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


def _write_pass(writer: KernelWriter, level: list[int], along_r: list[bool], number: int) -> None:
    program = writer.program
    folds = [
        i
        for i, op in enumerate(program.ops)
        if op.kind == "reduce" and level[op.inputs[0]] == number
    ]
    stores = [
        i
        for i, op in enumerate(program.ops)
        if op.kind == "store" and along_r[i] and level[i] == number
    ]
    if not folds and not stores:
        return
    needed = _needed(writer, folds + stores, along_r)
    for position in folds:
        _start_accumulator(writer, position)
    scans = [i for i in needed if program.ops[i].kind == "scan"]
    for position in scans:
        op = program.ops[position]
        start = "1" if op.fn == "cumprod" else "0"
        writer.line(
            f"carry_{position} = tl.full([{writer.schedule.x_block}, 1], {start}, {expressions.TYPES[op.dtype]})"
        )
    total = expressions.size(writer.points(program.reduced))
    writer.line(f"for start in range(0, {total}, {writer.schedule.r_block}):")
    writer.depth += 1
    outside = dict(writer.names)
    _row(writer, "start + ")
    for position in needed:
        if program.ops[position].kind == "scan":
            _scan_piece(writer, position)
        elif program.ops[position].kind != "reduce":
            writer.write(position)
    for position in folds:
        _accumulate(writer, position)
    writer.depth -= 1
    writer.names = outside
    for position in folds:
        _finish_accumulator(writer, position)


def _needed(writer: KernelWriter, targets: list[int], along_r: list[bool]) -> list[int]:
    """The row-dependent operations (in order) that the targets read, and
    the stores among the targets.
    """
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
    writer.line(f"acc_{position} = tl.full({_tile(writer)}, {neutral}, {kind})")
    if op.fn != fn:
        writer.line(f"place_{position} = tl.full({_tile(writer)}, {2**62}, tl.int64)")


def _accumulator_dtype(writer: KernelWriter, op: Op) -> torch.dtype:
    return writer.program.ops[op.inputs[0]].dtype


def _accumulate(writer: KernelWriter, position: int) -> None:
    op = writer.program.ops[position]
    value = writer.full(writer._tensor(op.inputs[0]), _tile(writer))
    dtype = _accumulator_dtype(writer, op)
    acc = f"acc_{position}"
    if op.fn in ("argmax", "argmin"):
        fn = op.fn.removeprefix("arg")
        value = writer.guarded(value, fn, dtype, ("r",))
        place = f"place_{position}"
        here = writer.full(_row_position(writer), _tile(writer))
        writer.line(f"{acc}, {place} = {_pair(fn)}({acc}, {place}, {value}, {here})")
        return
    if op.fn == "any":
        value = f"({value}).to(tl.int32)"
        dtype = torch.int32
    writer.line(
        f"{acc} = {writer.combined(op.fn, acc, writer.guarded(value, op.fn, dtype, ('r',)))}"
    )


def _finish_accumulator(writer: KernelWriter, position: int) -> None:
    op = writer.program.ops[position]
    name = f"{op.fn}_{position}"
    writer.names[f"%{position}"] = name
    if op.fn in ("argmax", "argmin"):
        pair = f"(acc_{position}, place_{position})"
        writer.line(
            f"_, {name} = tl.reduce({pair}, 1, {_pair(op.fn.removeprefix('arg'))}, keep_dims=True)"
        )
        return
    writer.line(f"{name} = {writer.folded(op.fn, f'acc_{position}', 1, op.dtype)}")


def _scan_piece(writer: KernelWriter, position: int) -> None:
    op = writer.program.ops[position]
    value = writer.full(writer._tensor(op.inputs[0]), _tile(writer))
    name, carry = f"{op.fn}_{position}", f"carry_{position}"
    fold = "prod" if op.fn == "cumprod" else "sum"
    combine = "*" if fold == "prod" else "+"
    inside = writer.guarded(value, fold, op.dtype, ("r",))
    writer.line(f"{name} = {carry} {combine} tl.{op.fn}({inside}, axis=1)")
    writer.line(f"{carry} = {carry} {combine} {writer.folded(fold, inside, 1, op.dtype)}")
    writer.names[f"%{position}"] = name


# --- many rows a program, with sums down the columns


def write_rows(writer: KernelWriter) -> None:
    """Each program walks its share of the rows; column sums stay in registers until it ends."""
    program, block = writer.program, writer.schedule.x_block
    columns = [
        i for i, op in enumerate(program.ops) if op.kind == "reduce" and op.over == "parallel"
    ]
    partial = {i for i, op in enumerate(program.ops) if op.kind == "store" and op.fn == "partial"}
    _row(writer, "")
    for position in columns:
        dtype = program.ops[position].dtype
        kind = "tl.int32" if program.ops[position].fn == "any" else expressions.TYPES[dtype]
        neutral = writer.neutral(program.ops[position].fn, dtype)
        writer.line(f"acc_{position} = tl.full({_tile(writer)}, {neutral}, {kind})")
    by_row = {a.name for a in program.parallel}
    fixed = [
        not (program.varies[i] & by_row) and not _after(program.ops, i, columns)
        for i in range(len(program.ops))
    ]
    for position, op in enumerate(program.ops):
        if fixed[position] and op.kind not in ("store", "reduce"):
            writer.write(position)
    total = expressions.size(writer.points(program.parallel))
    writer.line(
        f"for first in range(tl.program_id(0) * {block}, {total}, {writer.schedule.programs * block}):"
    )
    writer.depth += 1
    writer.line(f"x = first + tl.arange(0, {block})[:, None]")
    writer.bounded("x", "x", writer.points(program.parallel), block)
    writer.flat_axes(program.parallel, "x", "x")
    for position, op in enumerate(program.ops):
        if position in columns:
            _accumulate_column(writer, position)
        elif op.kind == "reduce":
            _fold_tile(writer, position, op)
        elif position not in partial and f"%{position}" not in writer.names:
            writer.write(position)
    writer.depth -= 1
    for position in sorted(partial):
        _store_partial(writer, position)


def _after(ops: tuple[Op, ...], position: int, columns: list[int]) -> bool:
    reached = set(columns)
    for place, op in enumerate(ops[: position + 1]):
        if any(r in reached for r in op.reads):
            reached.add(place)
    return position in reached


def _accumulate_column(writer: KernelWriter, position: int) -> None:
    op = writer.program.ops[position]
    dtype = writer.program.ops[op.inputs[0]].dtype
    value = writer.full(writer._tensor(op.inputs[0]), _tile(writer))
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
    share = writer.program.buffer(op.buffer).elements // writer.schedule.programs  # type: ignore[operator]
    total = writer.folded(column.fn, f"acc_{op.inputs[0]}", 0, op.dtype)
    address = expressions.affine(op.index, writer.names)
    mask = f", {writer.masks['r']}" if "r" in writer.masks else ""
    writer.line(
        f"tl.store({op.buffer}_ptr + tl.program_id(0) * {share} + ({address}), {total}{mask})"
    )
