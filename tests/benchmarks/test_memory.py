"""Planned against measured peaks, and what is planned with no GPU."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest

from benchmarks import memory
from benchmarks.harness import Session
from benchmarks.memory import Sizes, add_point
from benchmarks.table import Row, Table
from iocompiler.recompute.trade import Again, Point, Trade


def test_the_planned_peak_is_held_against_the_measured_one() -> None:
    row: Row = {"measured MB": 80.0}
    add_point(row, Point("default", peak=100_000_000, time_us=7.0, saved=1))
    assert row["planned MB"] == 100
    assert row["off %"] == pytest.approx(25)
    assert (row["way"], row["modeled us"]) == ("default", 7.0)
    unmeasured: Row = {}
    add_point(unmeasured, Point("default", 1, 1.0, 1))
    assert "off %" not in unmeasured


def test_rows_are_budgets_and_the_first_is_what_nothing_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free, tight = Point("default", 8_000_000, 5.0, 1), Point("light", 3_000_000, 6.0, 1)
    trade = Trade(4_000_000, tight, free, again=(Again("x", "aten.gelu", 7),))

    def explained(*args: object, memory_budget: float | None, **settings: object) -> object:
        assert settings["training"] is True
        return SimpleNamespace(trades=() if memory_budget is None else (trade,))

    monkeypatch.setattr("benchmarks.timing.on_gpu", lambda: False)
    monkeypatch.setattr(memory, "explain", explained)
    monkeypatch.setattr(memory, "BUDGETS", (None, 0.5))
    args = argparse.Namespace(
        quick=True, limit=100.0, peers="ours", json=None, only="", caches=None
    )
    session = Session(args, Table("t", ["name"]))
    sizes = Sizes(vocabulary=17, width=16, heads=2, layers=1, length=8, batch=2)
    memory._ours(session, sizes, [])
    assert session.table.rows == [
        {"name": "ours, no budget", "way": "default", "planned MB": 8.0, "modeled us": 5.0},
        {
            "name": "ours, budget 0.5",
            "allowed MB": 4.0,
            "made again": 1,
            "way": "light",
            "planned MB": 3.0,
            "modeled us": 6.0,
        },
    ]
