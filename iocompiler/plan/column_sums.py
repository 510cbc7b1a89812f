"""Kernels that store something for each element of a matrix, and sums down its columns in parts
(the gradient of an activation, and that of the bias before it), seen as epilogues of a product.

`tile/split.py` cuts such a reduction into parts of as many rows as fill the device; behind a
product a part is `rows_of_part` rows, which lie in one tile. `apart` takes the sums out of the
kernel's program, so that the rest is pointwise; `together` puts them back once its axes are those
of the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from iocompiler.plan.data import BatchStep, KernelStep, Step
from iocompiler.plan.product import along
from iocompiler.plan.sizes import divide, equal
from iocompiler.tile.flat import folds
from iocompiler.tile.index import Affine, Axis, Size, product, row_major
from iocompiler.tile.program import Builder, Op, TileProgram, drop_dead

ROWS = (128, 64)
"""Rows of a part: the first that divides the rows of the product. Tiles are as high or higher."""
_SUM = "column_sum"
_APART = 2
"""Between the places of rows, in columns: were it 1, sums over matrices would look like these."""


def has_column_sums(program: TileProgram) -> bool:
    """Whether all that the program reduces are sums in parts, each stored as it is."""
    reductions = [i for i, op in enumerate(program.ops) if op.kind == "reduce"]
    readers: dict[int, list[Op]] = {i: [] for i in reductions}
    for op in program.ops:
        for read in op.reads:
            if read in readers:
                readers[read].append(op)
    return (
        bool(reductions)
        and len(program.parallel) > 1
        and not any(op.kind == "scan" for op in program.ops)
        and all(_is_sum(program.ops[i]) for i in reductions)
        and all(len(ops) == 1 and _is_part(ops[0], program) for ops in readers.values())
    )


def _is_sum(op: Op) -> bool:
    return op.fn == "sum" and op.over == "reduced" and op.dtype == torch.float32


def _is_part(op: Op, program: TileProgram) -> bool:
    """A store of a sum to its place among the parts, which `tile/split.py` has outermost."""
    if op.kind != "store" or op.fn or len(op.inputs) > 1:
        return False
    points = product([a.size for a in program.parallel])
    same = op.index == row_major(program.parallel)
    return same and equal(program.buffer(op.buffer).elements, points)


def apart(program: TileProgram) -> TileProgram:
    """The program over all its axes as parallel ones. What was summed is stored instead, by the
    element's row and its column, under the name of the buffer its sums would go to.
    """
    if not has_column_sums(program):
        return program
    rows, columns = (program.parallel[0], *program.reduced), program.parallel[1:]
    place = _place(rows, columns)
    ops = []
    for op in program.ops:
        if op.kind == "reduce":
            op = Op("const", op.dtype)
        elif op.kind == "store" and program.ops[op.inputs[0]].kind == "reduce":
            summed = program.ops[op.inputs[0]].inputs[0]
            op = replace(op, inputs=(summed,), fn=_SUM, index=place)
        ops.append(op)
    return drop_dead(replace(program, parallel=(*rows, *columns), reduced=(), ops=tuple(ops)))


def is_sum(op: Op) -> bool:
    """Whether an operation stands for a sum that `apart` has taken out."""
    return op.kind == "store" and op.fn == _SUM


def together(program: TileProgram) -> TileProgram | None:
    """The program with the sums that stood in it, over parts of the product's rows: its innermost
    axis of rows is cut, and what is left of it reduced. None where columns of the product are no
    columns of the sums, or its rows are no whole parts.
    """
    stores = [op for op in program.ops if is_sum(op)]
    if not stores:
        return program
    m, n = along(program, "m"), along(program, "n")
    length = product([a.size for a in n])
    if not m or any(not _same(op.index, _place(m, n)) for op in stores):
        return None
    last = m[-1]
    rows = next((r for r in ROWS if divide(last.size, r) is not None), None)
    outer = None if rows is None else divide(last.size, rows)
    if rows is None or outer is None:
        return None
    above, within = Axis(last.name, outer), Axis("mr", rows)
    places = {last.name: Affine.of(above.name) * rows + Affine.of(within.name)}
    parallel = tuple(above if axis == last else axis for axis in program.parallel)
    parts = (*m[:-1], above)
    elements = product([length, *(a.size for a in parts)])
    build, moved = Builder(), list[int]()
    for op in program.ops:
        inputs = tuple(moved[i] for i in op.inputs)
        if is_sum(op):
            moved.append(build.reduce("sum", inputs[0], torch.float32))
            build.store(op.buffer, row_major(n) + row_major(parts) * length, moved[-1])
            continue
        index = op.index
        if index is not None:
            values = {f"%{v}": Affine.of(f"%{moved[v]}") for v in index.values}
            index = index.substitute(places | values)
        moved.append(build.add(replace(op, inputs=inputs, index=index)))
    summed = {op.buffer for op in stores}
    buffers = tuple(
        replace(b, elements=elements) if b.name in summed else b for b in program.buffers
    )
    return build.program(parallel, (within,), buffers)


def _place(rows: tuple[Axis, ...], columns: tuple[Axis, ...]) -> Affine:
    """Where `apart` stores what is summed."""
    length = product([a.size for a in columns])
    return row_major(columns) + row_major(rows) * (length * _APART)


def _same(a: Affine | None, b: Affine) -> bool:
    names = {*a.names, *b.names} if a is not None else set()
    return (
        a is not None
        and equal(a.const, b.const)
        and all(equal(a.coefficient(name), b.coefficient(name)) for name in names)
    )


def rows_of_part(program: TileProgram) -> int:
    """Rows that lie in one tile; 1 for an epilogue without sums."""
    return int(program.reduced[0].size) if program.reduced else 1


# --- those who fold the parts


@dataclass(frozen=True)
class Resized:
    """Elements of a tensor of sums in parts, as a kernel leaves them and as the epilogue does."""

    before: Size
    after: Size


def folds_any(step: Step, names: Mapping[str, Resized]) -> bool:
    """Whether a step that reads these tensors folds any number of parts."""
    if isinstance(step, BatchStep):
        return bool(step.parts)
    if not isinstance(step, KernelStep) or not folds(step.program):
        return False
    kind, counts = step.schedule.kind, [each.after for each in names.values()]
    in_registers = kind == "persistent" and all(isinstance(count, int) for count in counts)
    several = {arg for arg in step.args if arg in names}
    return (kind == "looped" or in_registers) and several == set(_read_in_parts(step))


def _read_in_parts(step: KernelStep) -> list[str]:
    """The arguments of which the step reads several parts."""
    (axis,) = step.program.reduced
    several = {
        op.buffer
        for op in step.program.ops
        if op.kind == "load" and op.index is not None and axis.name in op.index.names
    }
    return [arg for b, arg in zip(step.buffers, step.args, strict=True) if b.name in several]


def folding(step: Step, names: Mapping[str, Resized]) -> Step:
    """The step as it folds what an epilogue leaves; itself where it reads none of it."""
    if isinstance(step, BatchStep):
        rows = zip(step.members, step.parts, strict=True) if step.parts else ()
        return replace(step, parts=tuple(_count(n, args, names) for (args, _), n in rows))
    if not isinstance(step, KernelStep) or not names.keys() & set(step.args):
        return step
    buffers = tuple(
        replace(b, elements=names[arg].after) if arg in names else b
        for b, arg in zip(step.buffers, step.args, strict=True)
    )
    (axis,) = step.program.reduced
    count = _count(axis.size, step.args, names)
    program = replace(step.program, reduced=(replace(axis, size=count),), buffers=buffers)
    schedule = step.schedule
    if schedule.kind == "persistent":
        schedule = replace(schedule, r_block=1 << (int(count) - 1).bit_length())
    return replace(step, program=program, schedule=schedule)


def _count(parts: Size, args: tuple[str, ...], names: Mapping[str, Resized]) -> Size:
    """How many parts there are of what is read."""
    change = next((names[arg] for arg in args if arg in names), None)
    if change is None:
        return parts
    count = divide(parts * change.after, change.before)
    assert count is not None
    return count
