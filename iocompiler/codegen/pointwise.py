"""Kernels without reductions: a row of points, or a square tile if accesses run along two axes."""

from __future__ import annotations

from iocompiler.codegen import expressions
from iocompiler.codegen.kernel_writer import KernelWriter
from iocompiler.plan.data import Schedule
from iocompiler.tile.arrange import pointwise_tiling
from iocompiler.tile.index import Size, ceil_div, product
from iocompiler.tile.program import TileProgram
from iocompiler.tile.scaling import scaling


def pointwise_grid(program: TileProgram, schedule: Schedule) -> tuple[Size, Size, Size]:
    """Launch grid of a merged program: x blocks, y blocks, remaining axes."""
    if schedule.programs:
        return schedule.programs, 1, 1
    tiling = pointwise_tiling(program)
    columns = ceil_div(product([a.size for a in tiling.x]), schedule.x_block)
    if tiling.y is None:
        return columns, 1, 1
    # the first grid dimension is the only one without a limit of 65535
    rest = product([a.size for a in tiling.grid])
    return columns * ceil_div(tiling.y.size, schedule.y_block) * rest, 1, 1


def write_pointwise(writer: KernelWriter) -> None:
    """Write the kernel of a program without reductions."""
    if writer.schedule.programs:
        _walk(writer)
    elif pointwise_tiling(writer.program).y is None:
        write_row_of_points(writer, "tl.program_id(0)")
    else:
        _two_dimensions(writer)
        _operations(writer)


def _walk(writer: KernelWriter) -> None:
    """A product with one number, which may be written over what is multiplied: its programs walk
    the tiles, so that they are few where there is nothing to do.
    """
    found = scaling(writer.program)
    assert found is not None
    writer.line("# a product with 1, written over its operand, stands there already")
    writer.line(f"factor = tl.load({found.factor}_ptr + {found.at})")
    same = f"{found.source}_ptr.to(tl.int64) == {found.out}_ptr.to(tl.int64)"
    writer.line(f"if (factor == 1) & ({same}):")
    writer.line("    return")
    tiles = expressions.size(
        ceil_div(writer.points(writer.program.parallel), writer.schedule.x_block)
    )
    writer.line(f"for tile in range(tl.program_id(0), {tiles}, {writer.schedule.programs}):")
    writer.depth += 1
    write_row_of_points(writer, "tile")
    writer.depth -= 1


def _operations(writer: KernelWriter) -> None:
    for position in range(len(writer.program.ops)):
        writer.write(position)


def write_row_of_points(writer: KernelWriter, number: str, masked: bool = True) -> None:
    """All points as one row; ``number`` is the text of the block's, ``masked`` False if whole."""
    writer.rank = 1
    axes, block = writer.program.parallel, writer.schedule.x_block
    total = product([a.size for a in axes])
    wide = "" if expressions.fits_int32(total) else ".to(tl.int64)"
    writer.line(f"x = {number}{wide} * {block} + tl.arange(0, {block})")
    if masked:
        writer.bounded("x", "x", total, block)
    writer.flat_axes(axes, "x", "x")
    _operations(writer)


def _two_dimensions(writer: KernelWriter) -> None:
    tiling = pointwise_tiling(writer.program)
    assert tiling.y is not None
    x_block, y_block = writer.schedule.x_block, writer.schedule.y_block
    (x_axis,) = tiling.x
    columns = expressions.size(ceil_div(x_axis.size, x_block))
    rows = expressions.size(ceil_div(tiling.y.size, y_block))
    writer.line(f"tile = tl.program_id(0) // ({columns})")
    writer.line(
        f"x = (tl.program_id(0) % ({columns})) * {x_block} + tl.arange(0, {x_block})[None, :]"
    )
    writer.line(f"y = (tile % ({rows})) * {y_block} + tl.arange(0, {y_block})[:, None]")
    writer.bounded("x", "x", x_axis.size, x_block)
    writer.bounded("y", "y", tiling.y.size, y_block)
    writer.names[x_axis.name], writer.direction[x_axis.name] = "x", "x"
    writer.names[tiling.y.name], writer.direction[tiling.y.name] = "y", "y"
    if tiling.grid:
        writer.line(f"rest = tile // ({rows})")
        writer.flat_axes(tiling.grid, "rest", "z")
