"""Programs that reduce along rows and down columns: two programs that together do the same."""

from __future__ import annotations

import pytest
import torch

from iocompiler.plan.data import Schedule
from iocompiler.tile.index import Affine, Axis
from iocompiler.tile.interpret import run
from iocompiler.tile.program import Buffer, Builder, TileProgram
from iocompiler.tile.rows import RowsTooLong, check_rows, split_rows

X, R = Affine.of("x0"), Affine.of("r0")


def program(rows: int, width: int, fn: str = "sum", late_use: bool = False) -> TileProgram:
    """x [rows, width] -> row sums, twice the column reduction; ``late_use``: and a row of it."""
    build = Builder()
    value = build.load("x", X * width + R, torch.float32)
    build.store("rows", X, build.reduce("sum", value, torch.float32))
    column = build.reduce(fn, value, torch.float32, over="parallel")
    two = build.const(2.0, torch.float32)
    build.store("columns", R, build.map("mul", column, two))
    if late_use:
        build.store("late", X * width + R, build.map("mul", value, column))
    sizes = {"rows": rows, "columns": width, "late": rows * width}
    buffers = [Buffer("x", torch.float32, "in", rows * width)]
    buffers += [Buffer(name, torch.float32, "out", size) for name, size in sizes.items()]
    return build.program((Axis("x0", rows),), (Axis("r0", width),), tuple(buffers))


@pytest.mark.parametrize(
    ("rows", "width", "programs"), [(6, 5, 4), (1, 7, 3), (9, 1, 2), (8, 16, 8)]
)
@pytest.mark.parametrize("fn", ["sum", "max"])
def test_two_programs_do_the_work_of_one(rows: int, width: int, programs: int, fn: str) -> None:
    first, second = split_rows(program(rows, width, fn), programs)
    x = torch.randn(rows, width)
    buffers = {
        "x": x.flatten(),
        "rows": torch.full((rows,), torch.nan),
        "columns": torch.full((width,), torch.nan),
        "partial0": torch.full((programs * width,), torch.nan),
    }
    schedule = Schedule("rows", programs=programs)
    run(first, buffers, {}, schedule)
    run(second, buffers, {})
    want = x.sum(0) if fn == "sum" else x.amax(0)
    torch.testing.assert_close(buffers["rows"], x.sum(1))
    torch.testing.assert_close(buffers["columns"], 2 * want)


def test_each_program_touches_only_its_own_buffers() -> None:
    first, second = split_rows(program(6, 5), 4)
    assert [b.name for b in first.buffers] == ["x", "rows", "partial0"]
    assert [b.name for b in second.buffers] == ["columns", "partial0"]


def test_rows_too_long_for_registers_are_declined() -> None:
    check_rows(program(4, 16384))  # a tile of 16384, 12 bytes an element
    with pytest.raises(RowsTooLong, match=r"16385 elements .* 393216 bytes"):
        check_rows(program(4, 16385))  # one of 32768


def test_a_column_sum_of_a_column_sum_is_declined() -> None:
    """The variance of columns, say: a second pass over the rows."""
    build = Builder()
    value = build.load("x", X * 8 + R, torch.float32)
    column = build.reduce("sum", value, torch.float32, over="parallel")
    apart = build.map("sub", value, column)
    again = build.reduce("sum", build.map("mul", apart, apart), torch.float32, over="parallel")
    build.store("columns", R, again)
    buffers = [Buffer("x", torch.float32, "in", 32), Buffer("columns", torch.float32, "out", 8)]
    found = build.program((Axis("x0", 4),), (Axis("r0", 8),), tuple(buffers))
    with pytest.raises(RowsTooLong, match="needs the result of another"):
        check_rows(found)


def test_a_row_that_needs_a_column_sum_is_declined() -> None:
    with pytest.raises(RowsTooLong, match="needs the result"):
        check_rows(program(4, 8, late_use=True))
