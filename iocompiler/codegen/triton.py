"""Tile programs as Triton source: a readable ``@triton.jit`` function each, blocks as literals."""

from __future__ import annotations

from collections.abc import Callable

from iocompiler.codegen.column_sums import write_rows
from iocompiler.codegen.kernel_writer import KernelWriter
from iocompiler.codegen.loops import write_looped, write_persistent
from iocompiler.codegen.pointwise import pointwise_grid, write_pointwise
from iocompiler.codegen.prelude import PRELUDE
from iocompiler.plan.data import Schedule
from iocompiler.tile.arrange import merge_axes
from iocompiler.tile.index import Size, ceil_div, product
from iocompiler.tile.program import TileProgram

_WRITERS: dict[str, Callable[..., None]] = {
    "pointwise": write_pointwise,
    "persistent": write_persistent,
    "looped": write_looped,
    "rows": write_rows,
}


def emit(program: TileProgram, schedule: Schedule, name: str) -> str:
    """The source of the kernel ``name``.

    Its parameters are the program's buffers in order (pointers named ``<buffer>_ptr``, plain
    numbers for role "scalar"), then its size symbols. It refers to the names `PRELUDE` defines.
    """
    writer = KernelWriter(merge_axes(program), schedule)
    _WRITERS[schedule.kind](writer)
    return writer.text(name, program)


def grid(program: TileProgram, schedule: Schedule) -> tuple[Size, Size, Size]:
    """The launch grid, as sizes."""
    if schedule.kind == "rows":
        return schedule.programs, 1, 1
    merged = merge_axes(program)
    if schedule.kind == "pointwise":
        return pointwise_grid(merged, schedule)
    return ceil_div(product([a.size for a in merged.parallel]), schedule.x_block), 1, 1


__all__ = ["PRELUDE", "emit", "grid"]
