"""The modeled time of a kernel: memory, arithmetic, or asking for what it reads."""

from __future__ import annotations

import pytest

from iocompiler.cost_model.device import DEVICES
from iocompiler.cost_model.kernel import kernel_seconds
from iocompiler.tile.program import Builder, TileProgram
from tests.codegen.programs import BF16, F32, R0, X0, X1, axes, ins, outs

H200 = DEVICES["h200"]
ROWS, TAPS = 1 << 16, 32


def taps(count: int, apart: int) -> TileProgram:
    """out[x, y] = the sum of ``count`` elements of row x, which begin ``apart`` elements apart."""
    build = Builder()
    total = build.load("a", X0 * 256 + X1, BF16)
    for tap in range(1, count):
        total = build.map("add", total, build.load("a", X0 * 256 + X1 * apart + tap, BF16))
    build.store("out", X0 * 128 + X1, total)
    buffers = ins(a=(BF16, ROWS * 256)) + outs(out=(BF16, ROWS * 128))
    return build.program(axes(ROWS, 128), (), buffers)


def test_elements_that_lie_apart_are_asked_for_one_by_one() -> None:
    few, beside, scattered = (
        kernel_seconds(taps(*given), H200, {}) for given in ((2, 1), (TAPS, 1), (TAPS, 2))
    )
    assert few == pytest.approx(beside)  # bound by memory: more of the same words cost nothing
    assert scattered > 2 * beside


def test_what_all_columns_share_is_not_asked_for_anew() -> None:
    """A number of each row beside its reduction is loaded once a row, whatever its stride."""
    build = Builder()
    x = build.load("a", X0 * 4096 + R0, F32)
    scaled = build.map("mul", x, build.load("scale", X0 * 4096, F32))
    build.store("out", X0, build.reduce("sum", scaled, F32))
    buffers = ins(a=(F32, ROWS * 4096), scale=(F32, ROWS * 4096)) + outs(out=(F32, ROWS))
    program = build.program(axes(ROWS), axes(4096, reduced=True), buffers)
    moved = ROWS * 4096 * 4 / H200.hbm_bytes_per_s
    assert kernel_seconds(program, H200, {}) < 1.1 * moved


def less_its_sum(rows: int, length: int, stored: bool) -> TileProgram:
    """The sums of rows, and where ``stored`` what is left of each element without its row's."""
    build = Builder()
    x = build.load("a", X0 * length + R0, F32)
    total = build.reduce("sum", x, F32)
    build.store("sums", X0, total)
    kinds = {"sums": (F32, rows)}
    if stored:
        build.store("out", X0 * length + R0, build.map("sub", x, total))
        kinds["out"] = (F32, rows * length)
    buffers = ins(a=(F32, rows * length)) + outs(**kinds)
    return build.program(axes(rows), axes(length, reduced=True), buffers)


def test_few_rows_that_wait_for_their_reductions_leave_most_of_a_device_idle() -> None:
    """Batch norms have a row for each channel; a reduction alone is cut into parts."""
    length = 1 << 20
    moved = 4 * length * 4 / H200.hbm_bytes_per_s
    assert kernel_seconds(less_its_sum(4, length, False), H200, {}) < 1.3 * moved + H200.launch_s
    assert kernel_seconds(less_its_sum(4, length, True), H200, {}) > 10 * moved
    many = kernel_seconds(less_its_sum(1024, 4096, True), H200, {})
    assert many < 1.3 * 2 * moved + H200.launch_s
    # one row of a decoded token is not worth three launches
    assert kernel_seconds(less_its_sum(1, 4096, True), H200, {}) < 2 * H200.launch_s
