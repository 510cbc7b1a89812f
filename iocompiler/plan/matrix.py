"""A pointwise program seen as what becomes of the elements of a matrix product.

The kernel that reads a product walks axes of its own: merged, split or permuted, as its other
tensors want them. Here they are told apart into those along the batch, the rows and the columns of
the product; then the loads of the product are replaced by the sums it is made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from iocompiler.plan.column_sums import apart, is_sum, together
from iocompiler.plan.product import DIRECTIONS, along
from iocompiler.plan.sizes import divide, equal, normal
from iocompiler.tile.arrange import merge_axes
from iocompiler.tile.index import Affine, Axis, Size, product, row_major
from iocompiler.tile.program import Buffer, Builder, Op, TileProgram


class NoEpilogue(Exception):
    """The program cannot be the epilogue of a product; the message is the reason."""


@dataclass(frozen=True)
class Added:
    """A tensor that is added to the sums before they are rounded: strides along b, m and n, from
    the element ``start`` on.
    """

    buffer: Buffer
    strides: tuple[Size, Size, Size]
    start: Size = 0


@dataclass(frozen=True)
class Made:
    """A product as the program reads it: ``shape`` and ``strides`` along b, m and n, from the
    element ``start`` on of ``buffers``, which all stand for it, and of the ``kept`` one in which it
    is stored, too.
    """

    buffers: frozenset[str]
    dtype: torch.dtype
    shape: tuple[Size, Size, Size]
    strides: tuple[Size, Size, Size]
    added: Added | None = None
    kept: Buffer | None = None
    start: Size = 0

    def is_read_by(self, op: Op) -> bool:
        """Whether the operation loads an element of it."""
        if op.kind != "load" or op.buffer not in self.buffers or op.index is None:
            return False
        return equal(op.index.const, self.start)


def epilogue(program: TileProgram, products: Sequence[Made]) -> TileProgram:
    """The program with the sums of the products in place of loads: its first buffers are
    "sums0" (and "sums1"), float32 [batch, m, n], its axes are named b.., m.. and n...

    Products have equal shapes. Rounding stays where it was: a product is rounded to its dtype
    before the program computes with it. Where the program sums columns in parts, its parts are of
    as many rows as the axis it reduces then has (`column_sums.py`).

    Raises:
        NoEpilogue: the program does more than a value of its own for each element of the products,
            and sums of those.
    """
    program = apart(program)
    if program.reduced or any(op.kind in ("reduce", "scan") for op in program.ops):
        raise NoEpilogue("it reduces")
    program = merge_axes(program)
    for op in program.ops:
        _check_load(op, products)
    for made in products:
        program = _over_product(program, made)
    _check_stores(program)
    found = together(_with_sums(program, products))
    if found is None:
        raise NoEpilogue("its sums are not down columns of the product, of whole parts of its rows")
    return found


def stored(made: Made) -> TileProgram:
    """The epilogue that does nothing but store the product."""
    sizes = zip(DIRECTIONS, made.shape, strict=True)
    axes = tuple(Axis(f"{name}0", size) for name, size in sizes if not equal(size, 1))
    return _with_sums(TileProgram(axes, (), (), ()), [made])


# --- the axes


def _over_product(program: TileProgram, made: Made) -> TileProgram:
    """The program over axes b.., m.., n.. in the order of the product's elements."""
    index = _place(program, made)
    axes: dict[str, list[Axis]] = {name: [] for name in DIRECTIONS}
    for direction, size, stride in reversed(
        list(zip(DIRECTIONS, made.shape, made.strides, strict=True))
    ):
        left, step = size, stride
        while not equal(left, 1):
            axis = _axis_with(program, index, step, set().union(*axes.values()))
            if divide(left, axis.size) is None:
                program, index, axis = _cut(program, index, axis, left)
            rest = divide(left, axis.size)
            assert rest is not None
            axes[direction].insert(0, axis)
            left, step = rest, normal(step * axis.size)
    ordered = [axis for name in DIRECTIONS for axis in axes[name]]
    if len(ordered) != len(program.parallel):
        raise NoEpilogue("it computes more, or less, than a value for each element of the product")
    return _named(replace(program, parallel=tuple(ordered)), axes)


def _place(program: TileProgram, made: Made) -> Affine:
    """The one index at which the product is read."""
    found = {op.index for op in program.ops if op.index is not None and made.is_read_by(op)}
    if len(found) != 1:
        raise NoEpilogue("it reads the product at several places, or a part of it")
    (index,) = found
    return index


def _check_load(op: Op, products: Sequence[Made]) -> None:
    """What is read of a product must be what becomes the sums."""
    if op.kind != "load" or not any(op.buffer in made.buffers for made in products):
        return
    if op.inputs:
        raise NoEpilogue("it reads the product under a condition")
    if op.index is not None and op.index.values:
        raise NoEpilogue("it reads the product at computed places")
    if not any(made.is_read_by(op) for made in products):
        raise NoEpilogue("it reads the product at several places, or a part of it")


def _axis_with(program: TileProgram, index: Affine, step: Size, taken: set[Axis]) -> Axis:
    for axis in program.parallel:
        if axis not in taken and equal(index.coefficient(axis.name), step):
            return axis
    raise NoEpilogue("it does not read the product in rows and columns")


def _cut(
    program: TileProgram, index: Affine, axis: Axis, inner: Size
) -> tuple[TileProgram, Affine, Axis]:
    """The program with an axis cut where a row (or a matrix) of the product ends."""
    outer = divide(axis.size, inner)
    if outer is None:
        raise NoEpilogue("its rows are not those of the product")
    names = f"{axis.name}o", f"{axis.name}i"
    parts = (Axis(names[0], outer), Axis(names[1], inner))
    rename = {axis.name: Affine.of(names[0]) * inner + Affine.of(names[1])}
    axes = tuple(a for old in program.parallel for a in (parts if old == axis else (old,)))
    return _reindexed(replace(program, parallel=axes), rename), index.substitute(rename), parts[1]


def _named(program: TileProgram, axes: Mapping[str, Sequence[Axis]]) -> TileProgram:
    """Axes of one direction merged where accesses allow, and named after it."""
    for direction in DIRECTIONS:
        program = _renamed(
            program, {a.name: f"{direction}{i}" for i, a in enumerate(axes[direction])}
        )
    for direction in DIRECTIONS:
        own = tuple(a for a in program.parallel if a.name.startswith(direction))
        others = tuple(a for a in program.parallel if not a.name.startswith(direction))
        # one direction at a time: what lies along another is passed for reduced, and stays
        merged = merge_axes(replace(program, parallel=own, reduced=()))
        ordered = sorted((*others, *merged.parallel), key=lambda a: DIRECTIONS.index(a.name[0]))
        program = replace(merged, parallel=tuple(ordered))
    return program


def _renamed(program: TileProgram, names: Mapping[str, str]) -> TileProgram:
    axes = tuple(Axis(names.get(a.name, a.name), a.size) for a in program.parallel)
    rename = {old: Affine.of(new) for old, new in names.items()}
    return _reindexed(replace(program, parallel=axes), rename)


def _reindexed(program: TileProgram, rename: Mapping[str, Affine]) -> TileProgram:
    ops = tuple(
        op if op.index is None else replace(op, index=op.index.substitute(rename))
        for op in program.ops
    )
    return replace(program, ops=ops)


def _check_stores(program: TileProgram) -> None:
    axes = {a.name for a in program.parallel}
    for op in program.ops:
        if op.kind != "store":
            continue
        if (op.fn and not is_sum(op)) or len(op.inputs) > 1:
            raise NoEpilogue("it adds into memory, or stores under a condition")
        if op.index is None or op.index.values or set(op.index.names) != axes:
            raise NoEpilogue("it stores something else than a value for each element")


# --- the sums


def _with_sums(program: TileProgram, products: Sequence[Made]) -> TileProgram:
    build, moved, rounded = Builder(), list[int](), list[tuple[Made, int]]()
    sums = tuple(
        Buffer(f"sums{i}", torch.float32, "in", product(list(made.shape)))
        for i, made in enumerate(products)
    )
    for made, buffer in zip(products, sums, strict=True):
        value = build.load(buffer.name, row_major(program.parallel), torch.float32)
        if made.added is not None:
            at = _address(program, made.added.strides) + made.added.start
            added = build.load(made.added.buffer.name, at, made.dtype)
            value = build.map("add", value, build.cast(added, torch.float32))
        rounded.append((made, build.cast(value, made.dtype)))
    for op in program.ops:
        stands = next((value for made, value in rounded if made.is_read_by(op)), None)
        moved.append(build.add(_moved(op, moved)) if stands is None else stands)
    for made, value in rounded:
        if made.kept is not None:
            at = _address(program, made.strides) + made.start
            build.store(made.kept.name, at, value)
    first = dict.fromkeys(m.added.buffer for m in products if m.added is not None)
    kept = dict.fromkeys(m.kept for m in products if m.kept is not None)
    gone = {name for made in products for name in made.buffers}
    others = tuple(b for b in program.buffers if b.name not in gone)
    return build.program(program.parallel, (), (*sums, *first, *others, *kept))


def _address(program: TileProgram, strides: tuple[Size, Size, Size]) -> Affine:
    """An element of a tensor with these strides along b, m and n."""
    address = Affine()
    for direction, stride in zip(DIRECTIONS, strides, strict=True):
        address = address + row_major(along(program, direction)) * stride
    return address


def _moved(op: Op, moved: Sequence[int]) -> Op:
    """The operation with the values it reads where they stand now."""
    index = op.index
    if index is not None and index.values:
        index = index.substitute({f"%{v}": Affine.of(f"%{moved[v]}") for v in index.values})
    return replace(op, inputs=tuple(moved[i] for i in op.inputs), index=index)
