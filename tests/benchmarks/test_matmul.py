"""The benchmark of products: a row measured without a GPU, by a bench that makes up the times."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.matmul import COLUMNS, Run, summarize
from benchmarks.matmul_zoo import (
    PARTS,
    Product,
    bias_gelu,
    dense,
    gated,
    input_gradient,
    layers,
    linear,
    weight_gradients,
)
from benchmarks.schedules import plan_on_fakes
from benchmarks.table import Table
from iocompiler.cost_model.device import DEVICES
from iocompiler.plan.data import MatmulStep, Plan
from iocompiler.plan.priced import priced
from iocompiler.runtime.reference import run_plan
from iocompiler.runtime.tune_matmul import Built

LAYERS = (dense(64, 32), dense(48, 32), dense(48))
SMALL = Product("small", "bias + GELU", bias_gelu, linear, LAYERS, (64, 48, 32))


class Made:
    """Loads plans for the reference; times 2 seconds apart and less for each later tile."""

    def __init__(self, wrong: int = -1) -> None:
        self.wrong = wrong

    def load(self, plans: Sequence[Plan]) -> list[Built | None]:
        return [self._loaded(number, plan) for number, plan in enumerate(plans)]

    def _loaded(self, number: int, plan: Plan) -> Built:
        def run(args: list[Any]) -> list[Any]:
            results = run_plan(plan, args)
            return [x + 1 for x in results] if number == self.wrong else results

        return run

    def time(
        self, plan: Plan, built: Sequence[Built], sizes: Mapping[str, int]
    ) -> list[float | None]:
        assert not any(isinstance(step, MatmulStep) for step in plan.steps)
        return [1.0, 2.0, *(1.0 / n for n in range(1, len(built) - 1))]


def run(products: Sequence[Product], bench: Made | None = None, **more: Any) -> Run:
    settings = {"only": "", "most": 3, "ahead": 2, "limit": 100.0, "check": True, "json": None}
    args = argparse.Namespace(**{**settings, **more})
    found = Run(args, DEVICES["h200"], bench, Table("t", COLUMNS))
    found.all(products)
    return found


def test_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    found = run([SMALL], Made(), json=str(path))
    (row,) = found.table.rows
    assert (row["library us"], row["apart us"], row["chosen us"]) == (1e6, 2e6, 1e6)
    assert row["best us"] == pytest.approx(1e6 / 3)
    assert (row["apart/chosen"], row["apart/best"]) == (2.0, pytest.approx(6.0))
    assert row["tiles"] == 3
    assert "note" not in row
    summarize(found.table, found.started)
    summary = found.table.summary
    assert summary["bias + GELU: apart/chosen, median"] == 2.0
    assert row["share"] is None, "of a library that takes a second nothing explains it"
    assert json.loads(path.read_text())["rows"][0]["name"] == "small"


@pytest.mark.parametrize(
    ("gains", "right", "worst"),
    [((1.25, 0.8), "2 of 2", 1.0), ((0.8, 0.5), "1 of 2", 1.25), ((2.0, 1.1), "1 of 2", 1.1)],
)
def test_the_choice_by_price_is_held_against_the_clock(
    gains: tuple[float, float], right: str, worst: float
) -> None:
    table = Table("t", COLUMNS)
    table.rows += [
        {"group": "g", "price": price, "apart/chosen": gain}
        for price, gain in zip(("fold", "apart"), gains, strict=True)
    ]
    summarize(table, 0.0)
    assert table.summary["choice by price, right"] == right
    assert table.summary["choice by price, times the faster way at worst"] == pytest.approx(worst)


def test_the_share_is_that_at_which_the_price_is_the_measured_time() -> None:
    """With a library that takes as long as the model says."""
    work = Product(
        "w", "g", bias_gelu, linear, (dense(8192, 64), dense(256, 64), dense(256)), (8192, 256, 64)
    )
    device = replace(DEVICES["h200"], matmul_template=0.7)
    plan = plan_on_fakes(work.function, dict(zip("xwb", work.layouts, strict=True)), "xwb")
    (each,) = priced(plan, device, {})
    assert each.folded_s is not None
    times = [each.library_s, 1.0, each.folded_s]

    class Modeled(Made):
        def load(self, plans: Sequence[Plan]) -> list[Built | None]:
            return [lambda args: [] for _ in plans]

        def time(self, plan: Plan, built: Sequence[Built], sizes: object) -> list[float | None]:
            return [*times, *[1.0] * (len(built) - 3)]

    found = run([work], Modeled(), check=False)
    (row,) = found.table.rows
    assert row["share"] == pytest.approx(0.7)
    summarize(found.table, found.started)
    assert found.table.summary["share, median of all (matmul_template)"] == row["share"]


def test_a_kernel_that_is_wrong_is_not_timed() -> None:
    (row,) = run([SMALL], Made(wrong=1)).table.rows
    assert "WRONG" in str(row["note"])
    assert row["tiles"] == 2
    assert "chosen us" not in row


def test_past_the_limit_nothing_is_compiled() -> None:
    (row,) = run([SMALL], Made(), limit=-1.0).table.rows
    assert "past" in str(row["note"])


def test_what_has_no_site_is_a_note() -> None:
    bare = Product("bare", "none", linear, linear, LAYERS, (64, 48, 32))
    rows = run([bare, SMALL]).table.rows
    assert "failed" in str(rows[0]["note"])
    assert rows[1]["chosen"]


Q, K, X = (64, 48), (64, 16), (64, 32)
OF_ONE_INPUT = {
    layers: (X, (48, 32), (16, 32), (16, 32)),
    weight_gradients: (Q, X, K, K),
    input_gradient: (Q, K, K, (48, 32), (16, 32), (16, 32)),
}


@pytest.mark.parametrize("function", OF_ONE_INPUT)
def test_all_results_are_compared(function: Any) -> None:
    layouts = tuple(dense(*shape) for shape in OF_ONE_INPUT[function])
    work = Product("qkv", "inputs", function, function, layouts, (64, 80, 32))
    (row,) = run([work], Made()).table.rows
    assert "note" not in row
    (row,) = run([work], Made(wrong=1)).table.rows
    assert "WRONG" in str(row["note"])
    assert row["tiles"] == 2


def test_every_part_has_products_of_different_names() -> None:
    for part in PARTS.values():
        names = [product.name for product in part()]
        assert len(set(names)) == len(names)
    assert len(list(PARTS["shapes"]())) >= 60
    assert len(list(PARTS["epilogues"]())) == 50


def test_two_products_count_twice() -> None:
    layouts = (dense(64, 32), dense(32, 48), dense(32, 48))
    pair = Product("pair", "gated", gated, gated, layouts, (64, 48, 32), products=2)
    assert pair.flops == 2 * SMALL.flops
    (row,) = run([pair], Made()).table.rows
    assert row["tiles"] == 3
