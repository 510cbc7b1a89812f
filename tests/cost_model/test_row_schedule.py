"""How many programs walk the rows of a norm's backward: by what they move and what runs at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch

from iocompiler.cost_model import row_schedule as rows_of
from iocompiler.cost_model.device import DEVICES, Device
from iocompiler.cost_model.row_schedule import row_programs, row_schedule
from iocompiler.cost_model.schedule import choose
from iocompiler.cost_model.tiles import at_hint
from iocompiler.plan.data import Schedule
from iocompiler.tile.index import Affine, Axis, Size, power_of_two
from iocompiler.tile.interpret import run
from iocompiler.tile.program import Buffer, Builder, TileProgram
from iocompiler.tile.rows import split_rows
from iocompiler.tile.traffic import traffic

H100 = DEVICES["h100"]
FEW_SMS = replace(H100, sm_count=4)
BF16, F32 = torch.bfloat16, torch.float32
ROWS = sympy.Symbol("s0", integer=True, positive=True)


def backward(
    rows: Size, width: int, dtype: torch.dtype = BF16, sums: int = 2, *, more: int = 0
) -> TileProgram:
    """dx = dy * w - x * (sum of dy * w * x along the row), and sums down the columns of dy * x and
    dy (the gradients of weight and bias), and of dx (that of the bias before it); of sin(dx), if
    ``more``, that often.
    """
    build, at, r = Builder(), Affine.of("x0") * width + Affine.of("r0"), Affine.of("r0")
    x, dy, w = (
        build.cast(build.load(name, place, dtype), F32)
        for name, place in (("x", at), ("dy", at), ("w", r))
    )
    scaled = build.map("mul", dy, w)
    along = build.reduce("sum", build.map("mul", scaled, x), F32)
    dx = build.map("sub", scaled, build.map("mul", x, along))
    for _ in range(more):
        dx = build.map("sin", dx)
    build.store("dx", at, build.cast(dx, dtype))
    for number, value in enumerate((build.map("mul", dy, x), dy, dx)[:sums]):
        total = build.reduce("sum", value, F32, over="parallel")
        build.store(f"d{number}", r, build.cast(total, dtype))
    buffers = [Buffer(name, dtype, "in", rows * width) for name in ("x", "dy")]
    buffers += [Buffer("w", dtype, "in", width), Buffer("dx", dtype, "out", rows * width)]
    buffers += [Buffer(f"d{number}", dtype, "out", width) for number in range(sums)]
    return build.program((Axis("x0", rows),), (Axis("r0", width),), tuple(buffers))


def halves(program: TileProgram, programs: int) -> int:
    """Bytes that the two kernels move."""
    return sum(at_hint(traffic(half).bytes, {}) for half in split_rows(program, programs))


@pytest.mark.parametrize("programs", [1, 132, 264])
@pytest.mark.parametrize("sums", [1, 2, 3])
def test_the_bytes_priced_are_those_of_both_kernels(programs: int, sums: int) -> None:
    program = backward(4096, 1024, sums=sums)
    assert rows_of._walked_bytes(program, programs, {}) == halves(program, programs)


@pytest.mark.parametrize(
    ("rows", "width", "sums", "programs", "x_block", "warps"),
    [
        (4096, 4096, 2, 132, 2, 8),
        (4096, 3000, 3, 132, 2, 8),
        (8192, 4096, 2, 264, 1, 4),  # half of two rows of sums are less than a twentieth
        (4096, 1024, 3, 264, 4, 4),  # rows that are shorter than a tile
        (4096, 2048, 2, 264, 2, 4),
        (8192, 768, 2, 264, 4, 4),
        (1 << 16, 1024, 3, 264, 4, 4),
    ],
)
def test_half_the_partial_rows_where_they_are_much_and_rows_are_long(
    rows: int, width: int, sums: int, programs: int, x_block: int, warps: int
) -> None:
    program = backward(rows, width, sums=sums)
    chosen = row_schedule(program, H100, {})
    assert (chosen.programs, chosen.x_block, chosen.num_warps) == (programs, x_block, warps)
    assert chosen.num_stages == 3
    saved = 1 - halves(program, 132) / halves(program, 264)
    assert (programs == 132) == (saved > 0.05 and width > 2048)
    # as many rows at once on a multiprocessor, and as many warps
    assert (x_block * programs, warps * programs) == (132 * (8192 // power_of_two(width)), 132 * 8)


def test_short_rows_of_what_holds_much_have_one_program_too() -> None:
    """Half the rows at a time, so that a thread has 16 elements of them, not 32."""
    chosen = row_schedule(backward(4096, 1024, more=8), H100, {})
    assert (chosen.programs, chosen.x_block, chosen.num_warps) == (132, 4, 8)
    assert row_schedule(backward(8192, 1024, more=8), H100, {}).programs == 264


def test_one_program_where_the_registers_hold_no_second() -> None:
    """256 threads of 32 elements: two would run one after the other, for nothing."""
    for rows in (4096, 8192, 1 << 16):
        chosen = row_schedule(backward(rows, 8192), H100, {})
        assert (chosen.programs, chosen.x_block, chosen.num_warps) == (132, 1, 8)
    wide = replace(H100, registers_per_sm=1 << 18)
    assert row_schedule(backward(1 << 16, 8192), wide, {}).programs == 264


def test_two_programs_where_no_loads_are_in_flight() -> None:
    program = backward(4096, 4096)
    assert row_schedule(program, H100, {}).programs == 132
    tight = replace(H100, shared_bytes_per_sm=48 << 10)
    chosen = row_schedule(program, tight, {})
    assert (chosen.programs, chosen.num_stages) == (264, 1)


@pytest.mark.parametrize("device", [H100, FEW_SMS, DEVICES["rtx4090"]])
@pytest.mark.parametrize("width", [16, 1024, 8192])
def test_every_program_has_rows(device: Device, width: int) -> None:
    for rows in (0, 1, 2, 5, 131, 132, 133, 264, 265, 528, 1000, 4096):
        chosen = row_schedule(backward(rows, width), device, {})
        assert 1 <= chosen.programs <= 2 * device.sm_count
        assert (chosen.programs - 1) * chosen.x_block < max(rows, 1)


@pytest.mark.parametrize("rows", [0, 1, 5, 40, 133, 300, 1000, 4096, 8192])
@pytest.mark.parametrize("sums", [1, 3])
@pytest.mark.parametrize("width", [1024, 8192, 16384])
def test_what_stores_partial_rows_has_the_programs_that_made_them_so(
    rows: int, width: int, sums: int
) -> None:
    program = backward(rows, width, sums=sums)
    before = row_schedule(program, H100, {})
    first, _ = split_rows(program, before.programs)
    assert choose(first, H100) == before
    changed = split_rows(program, 7)[0]
    assert choose(changed, H100).programs == 7


def test_rows_of_any_number_are_counted_by_the_hint() -> None:
    program = backward(ROWS, 4096)
    few, many = (row_schedule(program, H100, {"s0": n}) for n in (4096, 8192))
    assert (few.programs, many.programs) == (132, 264)
    assert row_programs(program, H100, {"s0": 3}) == 3


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 7, 8, 9, 33, 64])
@pytest.mark.parametrize("sums", [1, 3])
def test_results(rows: int, sums: int) -> None:
    """Of the two kernels, by any number of programs, against float64."""
    program = backward(rows, 40, F32, sums)
    x, dy, w = torch.randn(rows, 40), torch.randn(rows, 40), torch.randn(40)
    wide = [t.double() for t in (x, dy, w)]
    dx = wide[1] * wide[2] - wide[0] * (wide[0] * wide[1] * wide[2]).sum(1, keepdim=True)
    expected = [(wide[1] * wide[0]).sum(0), wide[1].sum(0), dx.sum(0)]
    for programs in {row_programs(program, FEW_SMS, {}), 1, 5}:
        buffers = {"x": x.flatten(), "dy": dy.flatten(), "w": w, "dx": torch.empty(rows * 40)}
        for number in range(sums):
            buffers[f"d{number}"] = torch.full((40,), torch.nan)
            buffers[f"partial{number}"] = torch.full((programs * 40,), torch.nan)
        first, second = split_rows(program, programs)
        run(first, buffers, {}, choose(first, FEW_SMS))
        run(second, buffers, {}, Schedule("looped"))
        torch.testing.assert_close(buffers["dx"].view(rows, 40).double(), dx, atol=1e-4, rtol=1e-4)
        for number, want in enumerate(expected[:sums]):
            torch.testing.assert_close(buffers[f"d{number}"].double(), want, atol=1e-4, rtol=1e-4)
