"""The tile of a kernel with reductions: points of the parallel axes down, of the reduced across."""

from __future__ import annotations

from iocompiler.codegen.kernel_writer import KernelWriter
from iocompiler.tile.program import Op

# a place in the row, as argmax and argmin give it
ROW_POSITION = "r.to(tl.int64)"


def name_parallel(writer: KernelWriter, start: str, masked: bool = True) -> None:
    """Name the parallel axes of the points from ``start`` on; they run down the tile. ``masked``:
    unless all of them are known to be there.
    """
    block = writer.schedule.x_block
    writer.line(f"x = {start} + tl.arange(0, {block})[:, None]")
    if masked:
        writer.bounded("x", "x", writer.points(writer.program.parallel), block)
    writer.flat_axes(writer.program.parallel, "x", "x")


def name_reduced(writer: KernelWriter, start: str = "", masked: bool = True) -> None:
    """Name the reduced axes of the points from ``start`` on; they run across the tile. ``masked``:
    unless all of them are known to be there.
    """
    block = writer.schedule.r_block
    offset = f"{start} + " if start else ""
    writer.line(f"r = {offset}tl.arange(0, {block})[None, :]")
    if masked:
        writer.bounded("r", "r", writer.points(writer.program.reduced), block)
    else:
        writer.masks.pop("r", None)
    writer.flat_axes(writer.program.reduced, "r", "r")


def tile(writer: KernelWriter) -> str:
    """The shape of the tile as text."""
    return f"[{writer.schedule.x_block}, {writer.schedule.r_block}]"


def rows_of(writer: KernelWriter, value: int) -> str:
    """The shape of a tile with the rows that a value differs in: what is the same for every row is
    folded once, and its result stored at one address.
    """
    rows = writer.schedule.x_block if "x" in writer.spans(value) else 1
    return f"[{rows}, {writer.schedule.r_block}]"


def extremum(fn: str) -> str:
    """The function of the prelude that merges two (value, place) pairs."""
    return {"max": "_later_maximum", "min": "_later_minimum"}[fn]


def fold_tile(writer: KernelWriter, position: int, op: Op) -> None:
    """Write a reduction along the rows of a tile that holds them whole."""
    shape = rows_of(writer, op.inputs[0])
    value = writer.full(writer.tensor(op.inputs[0]), shape)
    name = f"{op.fn}_{position}"
    writer.names[f"%{position}"] = name
    dtype = writer.program.ops[op.inputs[0]].dtype
    if op.fn in ("argmax", "argmin"):
        fn = op.fn.removeprefix("arg")
        value = writer.guarded(value, fn, dtype, ("r",))
        place = writer.full(f"({ROW_POSITION})", shape)
        writer.line(f"_, {name} = tl.reduce(({value}, {place}), 1, {extremum(fn)}, keep_dims=True)")
        return
    inside = writer.guarded(value, op.fn, dtype, ("r",))
    writer.line(f"{name} = {writer.folded(op.fn, inside, 1)}")
