"""Kernels over many sets of tensors, run by Triton's interpreter through the table they read."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.codegen.batch import UNIT, numbers_of
from iocompiler.plan.data import Schedule
from iocompiler.runtime.batch import BatchLaunch, Row
from iocompiler.tile.flat import flat_program, folds
from iocompiler.tile.program import TileProgram
from tests.codegen.kernels import batch_kernel_of
from tests.tile.test_flat import column_sums, scaled


def launch(program: TileProgram, schedule: Schedule, rows: list[Row], unit: int = 1) -> None:
    kernel = batch_kernel_of(program, schedule)

    def run(stream: int, x: int, y: int, z: int, table: int, blocks: int, aligned: int) -> None:
        tables = (batch._table, batch._blocks)
        assert (table, blocks) == tuple(t.data_ptr() for t in tables)
        kernel[x, y, z](*tables, aligned)

    cpu = torch.device("cpu")
    batch = BatchLaunch(lambda: run, schedule.x_block, numbers_of(program), cpu, unit)
    batch(0, rows)


@pytest.mark.parametrize("lengths", [(16, 48), (16, 5, 33), (1,)])
def test_pointwise(lengths: tuple[int, ...]) -> None:
    found = flat_program(scaled((8,)))
    assert found is not None
    members = [(torch.randn(n), torch.randn(1), torch.full((n,), torch.nan)) for n in lengths]
    launch(
        found[0],
        Schedule("pointwise", x_block=16),
        [(*(t.data_ptr() for t in m), m[0].numel()) for m in members],
    )
    for x, s, out in members:
        torch.testing.assert_close(out, x * s)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of NaN, which is meant
@pytest.mark.filterwarnings(
    "ignore:Conversion of an array:DeprecationWarning"
)  # Triton's interpreter in loops
@pytest.mark.parametrize(
    "sizes",
    [
        [(16, 8), (48, 3)],  # all aligned: whole blocks without a mask
        [(16, 9), (5, 4), (33, 1)],
        [(1, 7)],
    ],
)
@pytest.mark.parametrize("kinds", ["sum", "max"])
def test_folds(sizes: list[tuple[int, int]], kinds: str) -> None:
    fold = folds(column_sums((8,), 4, fn=kinds))[0]
    half = partial(torch.empty, dtype=torch.bfloat16)
    members = [(torch.randn(p, n), half(n).fill_(torch.nan)) for n, p in sizes]
    for rows, _ in members:
        rows[0, 0] = torch.inf
        rows[-1, -1] = torch.nan
    schedule = Schedule("looped", x_block=16, r_block=4)
    launch(
        fold.program,
        schedule,
        [
            (rows.data_ptr(), out.data_ptr(), p, n)
            for (rows, out), (n, p) in zip(members, sizes, strict=True)
        ],
        UNIT,
    )
    for rows, out in members:
        expected = rows.sum(0) if kinds == "sum" else rows.amax(0)
        torch.testing.assert_close(out, expected.to(out.dtype), equal_nan=True)
