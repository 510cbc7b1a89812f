"""Programs that reduce along rows and down columns: two programs that together do the same."""

from __future__ import annotations

import pytest
import torch

from iocompiler.plan.data import Schedule
from iocompiler.tile.index import Affine, Axis
from iocompiler.tile.interpret import run
from iocompiler.tile.program import Buffer, Builder, TileProgram
from iocompiler.tile.rows import RowsTooLong, check_rows, reads_again, split_rows

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


def products(width: int, sums: int, dtype: torch.dtype, in_place: bool = False) -> TileProgram:
    """x times the sum of its row, and so many sums down the columns of multiples of x."""
    build = Builder()
    x = build.load("x", X * width + R, dtype)
    wide = build.cast(x, torch.float32)
    along = build.reduce("sum", wide, torch.float32)
    build.store("x" if in_place else "out", X * width + R, build.map("mul", wide, along))
    for number in range(sums):
        value = build.map("mul", wide, build.const(number + 2.0, torch.float32))
        down = build.reduce("sum", value, torch.float32, over="parallel")
        build.store(f"down{number}", R, down)
    buffers = [Buffer("x", dtype, "inout" if in_place else "in", 4 * width)]
    buffers += [] if in_place else [Buffer("out", dtype, "out", 4 * width)]
    buffers += [Buffer(f"down{n}", torch.float32, "out", width) for n in range(sums)]
    return build.program((Axis("x0", 4),), (Axis("r0", width),), tuple(buffers))


@pytest.mark.parametrize(
    ("width", "sums", "again"),
    [
        (16384, 0, False),  # no sums down the columns: another kind of kernel
        (16384, 2, False),  # 2 + 3 x 4 bytes an element are held
        (16384, 3, True),  # of 2 + 4 x 4 all but one reduction's
        (8192, 6, False),
        (8193, 3, True),  # a tile of 16384
    ],
)
def test_rows_that_are_not_held_through_their_reductions_are_read_again(
    width: int, sums: int, again: bool
) -> None:
    found = products(width, sums, torch.bfloat16)
    check_rows(found)
    assert reads_again(found) is again
    if sums:
        assert reads_again(split_rows(found, 2)[0]) is again


@pytest.mark.parametrize(
    ("width", "sums", "dtype", "in_place"),
    [
        (16384, 3, torch.float32, False),  # 16 bytes an element: nothing is left
        (16384, 4, torch.bfloat16, False),
        (8192, 7, torch.bfloat16, False),
        (32768, 2, torch.bfloat16, False),
        (16384, 3, torch.bfloat16, True),  # another element may be there already
    ],
)
def test_rows_that_cannot_be_read_again_are_declined(
    width: int, sums: int, dtype: torch.dtype, in_place: bool
) -> None:
    found = products(width, sums, dtype, in_place)
    assert not reads_again(found)
    with pytest.raises(RowsTooLong, match="bytes of registers"):
        check_rows(found)


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
