"""Programs that reduce along rows and down columns at once (the backward pass of a norm).

One pass over the data gives the row results and, for every program, a partial sum of each
column; a second, small program folds the partials and finishes what was computed from
them. `split_rows` makes the two.
"""

from __future__ import annotations

from dataclasses import replace

from iocompiler.tile.index import Affine, Axis, Size, power_of_two, product, row_major
from iocompiler.tile.ops import compute_dtype
from iocompiler.tile.program import Buffer, Op, TileProgram, drop_dead

_REGISTERS = 1 << 16  # of a multiprocessor, four bytes each
# What a row that is read again may take of them; addresses and a few elements take the rest.
_SHARE_READ_AGAIN = 7 / 8


class RowsTooLong(Exception):
    """The rows of a program with column reductions do not fit the registers of a multiprocessor."""


def column_reductions(program: TileProgram) -> tuple[int, ...]:
    """Positions of the reductions over the parallel axes."""
    return tuple(
        i for i, op in enumerate(program.ops) if op.kind == "reduce" and op.over == "parallel"
    )


def check_rows(program: TileProgram) -> None:
    """Raise `RowsTooLong` where a program with column reductions cannot be scheduled."""
    if not column_reductions(program):
        return
    if not program.parallel:
        raise RowsTooLong("column sums over no rows")
    length = product([a.size for a in program.reduced])
    if not isinstance(length, int):
        raise RowsTooLong(f"column sums over rows of {length} elements: how long is not known")
    if _is_too_long(program) and not reads_again(program):
        held = _held(program) * power_of_two(length)
        raise RowsTooLong(
            f"rows of {length} elements beside their column sums: {held} bytes of registers"
        )
    if any(op.kind == "scan" for op in program.ops):
        raise RowsTooLong("a scan beside column sums")
    if any(
        program.ops[i].fn not in ("sum", "max", "min", "any", "prod")
        for i in column_reductions(program)
    ):
        raise RowsTooLong("an argmax down the columns")
    _check_order(program)


def reads_again(program: TileProgram) -> bool:
    """Whether registers hold the sums down the columns and a row as it is loaded, but not the row
    while its reductions are under way: what comes after them loads it again, from a cache.
    """
    if not column_reductions(program) or not _is_too_long(program):
        return False
    if any(buffer.role == "inout" for buffer in program.buffers):
        return False
    taken = _loaded(program) + folded_bytes(program, "parallel")
    width = power_of_two(int(product([a.size for a in program.reduced])))
    return taken * width <= _SHARE_READ_AGAIN * 4 * _REGISTERS


def _is_too_long(program: TileProgram) -> bool:
    """Whether a multiprocessor's registers do not hold a row through its reductions."""
    width = product([a.size for a in program.reduced])
    return isinstance(width, int) and _held(program) * power_of_two(width) > 4 * _REGISTERS


def _held(program: TileProgram) -> int:
    """Bytes an element of a row that live while its reductions are under way: what was loaded, as
    it lies in memory, the sums down the columns, and what each reduction along the row takes.

    A layer norm backward in bfloat16 at 16384 elements, with one of its two column sums, holds 18:
    it spilled, and ran at 45 % of a copy on an H200; an RMS norm's 14 ran at 91 %.
    """
    return _loaded(program) + folded_bytes(program, "parallel") + folded_bytes(program, "reduced")


def _loaded(program: TileProgram) -> int:
    reduced = {a.name for a in program.reduced}
    loads = {
        (op.buffer, op.index): op.dtype.itemsize
        for position, op in enumerate(program.ops)
        if op.kind == "load" and program.varies[position] & reduced
    }
    return sum(loads.values())


def folded_bytes(program: TileProgram, over: str) -> int:
    """Bytes an element that the reductions over these axes take."""
    folds = [op for op in program.ops if op.kind == "reduce" and op.over == over]
    return sum(compute_dtype(op.dtype).itemsize for op in folds)


def _check_order(program: TileProgram) -> None:
    """What a column reduction gives is known only when every row is done: no row may need it, and
    what is computed from it folds no row again.
    """
    depends = _depends(program)
    for column in column_reductions(program):
        if any(depends[read] for read in program.ops[column].reads):
            raise RowsTooLong("a column sum needs the result of another")
    for position in _dependent_stores(program):
        if program.varies[position] - {a.name for a in program.reduced}:
            raise RowsTooLong("a row needs the result of a column sum")
        if any(program.ops[i].kind == "reduce" for i in _sources(program, position)):
            raise RowsTooLong("a reduction beside or after a column sum gives one result")


def _sources(program: TileProgram, position: int) -> set[int]:
    """Positions read for the one at ``position``, no further than the column reductions."""
    columns, found, queue = set(column_reductions(program)), set[int](), [position]
    while queue:
        for read in program.ops[queue.pop()].reads:
            if read in columns:
                continue
            found.add(read)
            queue.append(read)
    return found


def _depends(program: TileProgram) -> list[bool]:
    found: list[bool] = []
    columns = set(column_reductions(program))
    for position, op in enumerate(program.ops):
        found.append(position in columns or any(found[r] for r in op.reads))
    return found


def _dependent_stores(program: TileProgram) -> list[int]:
    depends = _depends(program)
    return [i for i, op in enumerate(program.ops) if op.kind == "store" and depends[i]]


def split_rows(program: TileProgram, programs: int) -> tuple[TileProgram, TileProgram]:
    """(rows program with partial stores, finishing program).

    ``programs`` is the first one's number of programs.

    Partial buffers are named "partial0", ... with ``programs`` rows of the reduced extent each.
    """
    late = set(_dependent_stores(program))
    columns = [c for c in column_reductions(program) if _feeds(program, c, late)]
    length = product([a.size for a in program.reduced])
    row = row_major(program.reduced)
    ops = [op if i not in late else None for i, op in enumerate(program.ops)]
    kept: list[Op] = []
    buffers: list[Buffer] = []
    for number, column in enumerate(columns):
        dtype = compute_dtype(program.ops[column].dtype)
        name = f"partial{number}"
        buffers.append(Buffer(name, dtype, "out", length * programs))
        kept.append(Op("store", dtype, (column,), "partial", name, row))
    first_ops = [
        op if op is not None else Op("const", program.ops[i].dtype) for i, op in enumerate(ops)
    ]
    first = replace(
        program, buffers=program.buffers + tuple(buffers), ops=tuple(first_ops) + tuple(kept)
    )
    return drop_dead(first), _finish(program, columns, buffers, length, programs)


def _feeds(program: TileProgram, column: int, stores: set[int]) -> bool:
    reached = {column}
    for position, op in enumerate(program.ops):
        if any(r in reached for r in op.reads):
            reached.add(position)
    return bool(reached & stores)


def _finish(
    program: TileProgram, columns: list[int], partials: list[Buffer], length: Size, programs: int
) -> TileProgram:
    """Fold the partials over the new reduced axis "p"; what follows stays as it was."""
    late = set(_dependent_stores(program))
    names = {a.name: Affine.of(f"x{i}") for i, a in enumerate(program.reduced)}
    parallel = tuple(Axis(f"x{i}", a.size) for i, a in enumerate(program.reduced))
    row = row_major(parallel)
    ops: list[Op] = []
    moved: dict[int, int] = {}
    for position, op in enumerate(program.ops):
        if position in columns:
            buffer = partials[columns.index(position)]
            ops.append(
                Op("load", buffer.dtype, buffer=buffer.name, index=row + Affine.of("r0") * length)
            )
            fold = Op("reduce", op.dtype, (len(ops) - 1,), op.fn)
        elif op.kind == "store" and position not in late:
            fold = Op("const", op.dtype)
        else:
            fold = _moved(op, moved, names)
        moved[position] = len(ops)
        ops.append(fold)
    ins = tuple(replace(b, role="in") for b in partials)
    finishing = TileProgram(parallel, (Axis("r0", programs),), program.buffers + ins, tuple(ops))
    return drop_dead(finishing)


def _moved(op: Op, moved: dict[int, int], names: dict[str, Affine]) -> Op:
    index = op.index
    if index is not None:
        index = index.substitute(names | {f"%{v}": Affine.of(f"%{moved[v]}") for v in index.values})
    return replace(op, inputs=tuple(moved[i] for i in op.inputs), index=index)
