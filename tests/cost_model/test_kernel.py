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
