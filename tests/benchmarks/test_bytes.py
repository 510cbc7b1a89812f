"""Whole steps: ours over Inductor's, and which kernels are one row."""

from __future__ import annotations

import pytest

from benchmarks import bytes as group
from benchmarks.ncu import Launch
from benchmarks.table import Table


def test_whole_steps_are_compared_like_with_like() -> None:
    table = Table("t", ["name"])
    table.summary |= {
        "a: whole step, ours, modeled MB": 60.0,
        "a: whole step, inductor, counted MB": 100.0,
        "a: whole step, ours, measured MB": 70.0,
    }
    group._add_whole(table, "a")
    assert table.summary["a: whole step, ours / inductor, modeled / counted"] == 0.6
    assert "a: whole step, ours / inductor, measured" not in table.summary
    table.summary["a: whole step, inductor, measured MB"] = 140.0
    group._add_whole(table, "a")
    assert table.summary["a: whole step, ours / inductor, measured"] == 0.5


def test_equal_kernels_are_one_row_with_the_median_launch() -> None:
    table = Table("t", ["name"])
    names = ("sum", "sum_1", "sum_2", "norm")
    planned = [{"name": n, "graph": "forward", "bytes": 2_000_000, "bound": 0} for n in names]
    reads = (1_000_000, 2_000_000, 4_000_000, 2_000_000)
    launches = [Launch(n, read, 0, 0, 5) for n, read in zip(names, reads, strict=True)]
    group._fill(table, "a", planned, launches)
    sums, norm = table.rows
    assert (sums["launches"], sums["measured MB"], sums["off %"]) == (3, 2.0, 0.0)
    assert (norm["launches"], norm["measured MB"]) == (1, 2.0)
    assert table.summary["a: % of 4 kernels (all) within 15%"] == 50
    assert table.summary["a: modeled / measured, summed"] == pytest.approx(8 / 9)
