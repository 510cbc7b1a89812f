"""What a memory budget costs: less is never a higher peak, and what is saved really changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iocompiler import engines
from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.cost_model.device import DEVICES
from iocompiler.errors import BudgetWarning
from iocompiler.plan.data import MatmulStep
from iocompiler.recompute.budget import allowed
from iocompiler.recompute.trade import Point
from iocompiler.report.build import Part, build_report
from iocompiler.report.explain import explain
from tests.models.gpt import Block
from tests.recompute.stepping import (
    SMALLEST,
    Blocks,
    assert_never_higher,
    peak_of,
    step,
    traded,
    unplanned,
)


def points_of(model: nn.Module, *inputs: Tensor) -> tuple[Point, ...]:
    return traded(model, *inputs, memory_budget=1.0).points


@pytest.mark.parametrize("model", [Blocks(4), Blocks(2)])
def test_less_budget_is_never_a_higher_peak(model: nn.Module) -> None:
    points = points_of(model, torch.randn(300, 16))
    assert_never_higher(points)
    assert min(p.peak for p in points) < points[0].peak


def test_less_budget_is_never_a_higher_peak_of_a_transformer() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Block(16, 2) for _ in range(2)))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x).mean()

    points = points_of(Layers(), torch.randn(4, 64, 16))
    assert_never_higher(points)
    lowest = min(points, key=lambda p: p.peak)
    assert lowest.peak < 0.6 * points[0].peak
    assert lowest.time_us > points[0].time_us


@pytest.mark.parametrize("seed", range(20))
def test_any_points_give_monotone_choices(seed: int) -> None:
    numbers = torch.randint(1, 50, (9, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    assert_never_higher(tuple(Point(str(n), p, t, 0) for n, (p, t) in enumerate(numbers)))


def test_budgets_compiled_one_by_one() -> None:
    model, x = Blocks(4), torch.randn(512, 16)
    trades = [traded(model, x, memory_budget=b) for b in (1.0, 0.75, SMALLEST)]
    peaks = [trade.chosen.peak for trade in trades]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0]
    assert all(trade.points == trades[0].points for trade in trades)
    assert [trade.fits for trade in trades] == [True, True, False]
    assert trades[1].allowed == int(0.75 * trades[0].unconstrained.peak)


def test_bytes_and_fractions_say_the_same() -> None:
    model, x = Blocks(4), torch.randn(512, 16)
    part = traded(model, x, memory_budget=0.75)
    whole = traded(model, x, memory_budget=part.allowed)
    assert part == whole
    assert allowed(part.points, 0.75) == part.allowed


@pytest.mark.parametrize("budget", [1.0, 0.75])
def test_the_peak_that_is_told_is_that_of_the_plans(budget: float) -> None:
    _, record = step(Blocks(4), torch.randn(512, 16), engine=unplanned, memory_budget=budget)
    assert record.trade is not None
    assert record.trade.chosen.peak == peak_of(record)


def test_the_price_is_that_of_products_that_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    # small products are worth folding on it
    row = replace(DEVICES["h200"], sm_count=1, launch_s=1e-4)
    monkeypatch.setattr(engines, "device_row", lambda gm, options: row)
    model, x = Blocks(2, width=64).bfloat16(), torch.randn(80, 64).bfloat16()
    _, record = step(model, x, engine=unplanned, memory_budget=1.0)
    steps = [step for plan in record.plans.values() for step in plan.steps]
    assert any(isinstance(step, MatmulStep) for step in steps)
    assert record.trade is not None
    assert record.trade.chosen.peak == peak_of(record)
    parts = [Part(name, plan, {}) for name, plan in record.plans.items()]
    assert record.trade.chosen.time_us == build_report(parts, row).time_us


def test_what_is_saved_really_changes() -> None:
    model, x = Blocks(4), torch.randn(512, 16)
    sizes = {}
    for budget in (None, 1.0, 0.75):
        _, record = step(model, x, engine=unplanned, memory_budget=budget)
        flat = record.flat["forward"]
        (output,) = flat.graph.find_nodes(op="output")
        made = [n.meta["val"] for n in output.args[0] if n.op == "call_function"]
        sizes[budget] = sum(t.numel() for t in made if isinstance(t, Tensor))
    assert sizes[None] == sizes[1.0]
    assert sizes[0.75] < 0.5 * sizes[None]


def test_what_is_made_again_is_named() -> None:
    trade = traded(Blocks(4), torch.randn(512, 16), memory_budget=0.75)
    again = [each for each in trade.again if "tanh" in each.operator]
    assert again
    assert {each.bytes for each in again} == {512 * 128 * 4}
    assert all(each.where for each in again)


def test_without_the_option_nothing_is_traded() -> None:
    _, record = step(Blocks(2), torch.randn(5, 16))
    assert record.trade is None


def test_a_budget_that_nothing_keeps_is_told_once() -> None:
    torch._dynamo.reset()
    run = torch.compile(Blocks(2), backend=Compiler(engine="aten", memory_budget=7))
    with pytest.warns(BudgetWarning, match=r"allows 7 bytes, .* are \d+ bytes") as told:
        run(torch.randn(5, 16)).backward()
    assert [each.category for each in told].count(BudgetWarning) == 1  # Dynamo may add its own
    run(torch.randn(5, 16)).backward()  # and not again: a warning is an error here


def test_inference_has_no_budget() -> None:
    torch._dynamo.reset()
    records: list[Compilation] = []
    compiler = Compiler(engine="aten", memory_budget=1, on_compiled=records.append, strict=True)
    with torch.no_grad():
        torch.compile(Blocks(2), backend=compiler)(torch.randn(5, 16))
    assert records[0].trade is None


# --- what is told


@pytest.fixture(scope="module")
def report() -> Any:
    return explain(
        Blocks(4), torch.randn(512, 16), training=True, compile_kernels=False, memory_budget=0.75
    )


def test_the_report_has_the_trade(report: Any, tmp_path: Any) -> None:
    (trade,) = report.trades
    assert trade.fits
    assert trade.chosen.peak <= trade.allowed < trade.unconstrained.peak
    # the chosen plans are those of the report
    assert trade.chosen.time_us == pytest.approx(report.time_us)
    text = str(report)
    assert "memory for time, peak at most" in text
    assert f"* {trade.chosen.name}"[2:] in text
    assert "default" in text
    assert "again: " in text


def test_a_report_reads_back_with_its_trade(report: Any) -> None:
    from iocompiler.report.save import as_json, from_json

    assert from_json(as_json(report)).trades == report.trades
