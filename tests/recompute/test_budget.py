"""Training steps within a memory budget: gradients stay right, less budget is never a higher peak,
and what is saved really changes.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.errors import BudgetWarning
from iocompiler.plan.build import size_hints
from iocompiler.plan.peak import kept, scheduled_peak
from iocompiler.recompute.budget import allowed, choice
from iocompiler.recompute.trade import Point, Trade
from iocompiler.report.explain import explain
from tests.models.gpt import GPT, Block
from tests.models.zoo import CASES

SMALLEST = 1  # bytes: nothing fits
BUDGETS = (1.0, 0.6, SMALLEST)


class Blocks(nn.Module):
    """Layers between which little is alive, and a loss. With ``dropout``, masks in each."""

    def __init__(self, layers: int = 4, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, 8 * width),
                nn.Tanh(),
                nn.Dropout(dropout),
                nn.Linear(8 * width, width),
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def step(model: nn.Module, *inputs: Tensor, **options: Any) -> tuple[list[Tensor], Compilation]:
    """The loss and the gradients of one step, and what was compiled for it."""
    records: list[Compilation] = []
    torch._dynamo.reset()
    settings = {"engine": "aten", "strict": True, **options}
    run = torch.compile(model, backend=Compiler(on_compiled=records.append, **settings))
    model.zero_grad()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)
        loss = run(*inputs)
    loss.backward()
    (record,) = records
    return [loss.detach(), *(p.grad for p in model.parameters())], record


def traded(model: nn.Module, *inputs: Tensor, **options: Any) -> Trade:
    _, record = step(model, *inputs, **options)
    assert record.trade is not None
    return record.trade


def gpt() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    return GPT(layers=2), torch.randint(65, (2, 24)), torch.randint(65, (2, 24))


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5)


def in_float64(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    model.double().zero_grad()
    loss = model(*(x.double() if x.is_floating_point() else x for x in inputs))
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters())]
    model.float()
    return found


# --- what comes out


@pytest.mark.parametrize(
    ("engine", "budget"),
    [*((engine, b) for engine in ("aten", "reference") for b in BUDGETS), ("auto", SMALLEST)],
)
def test_gradients_are_those_of_float64(engine: str, budget: float) -> None:
    model, x = Blocks(3), torch.randn(60, 16)
    expected = in_float64(model, x)
    found, record = step(model, x, engine=engine, memory_budget=budget)
    assert_close(found, expected)
    assert record.trade is not None
    assert not record.fallbacks


def test_gradients_of_a_gpt() -> None:
    model, *inputs = gpt()
    expected = in_float64(model, *inputs)
    found, record = step(model, *inputs, memory_budget=SMALLEST)
    assert_close(found, expected)
    assert record.trade is not None
    assert record.trade.again
    assert_never_higher(record.trade.points)


@pytest.mark.slow
def test_a_model_that_returns_its_logits_beside_its_loss() -> None:
    """The backward is planned for the loss's gradient alone, as it is compiled."""
    case = CASES["gpt2-sdpa"]
    model, inputs = case.module(), case.inputs()
    model(**inputs).loss.backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    records: list[Compilation] = []
    torch._dynamo.reset()
    compiler = Compiler(engine=unplanned, memory_budget=1.0, on_compiled=records.append)
    torch.compile(model, backend=compiler)(**inputs).loss.backward()
    assert_close([p.grad for p in model.parameters()], expected)
    (record,) = records
    assert_never_higher(record.trade.points)  # type: ignore[union-attr]
    assert peak_of(record) == record.trade.chosen.peak  # type: ignore[union-attr]


@pytest.mark.parametrize("engine", ["aten", "auto"])
def test_dropout_is_replayed_where_it_runs_again(engine: str) -> None:
    """Equal seeds give equal masks in the forward; a mask drawn anew in the backward would give
    other gradients.
    """
    model, x = Blocks(3, dropout=0.5), torch.randn(256, 16)
    expected, _ = step(model, x, engine=engine, memory_budget=1.0)
    found, record = step(model, x, engine=engine, memory_budget=SMALLEST)
    assert record.trade is not None
    assert record.trade.again
    assert_close(found, expected)


# --- what it costs


def points_of(model: nn.Module, *inputs: Tensor) -> tuple[Point, ...]:
    return traded(model, *inputs, memory_budget=1.0).points


def assert_never_higher(points: tuple[Point, ...]) -> None:
    highest = max(point.peak for point in points)
    limits = [*range(0, highest + 2, max(1, highest // 200)), highest]
    chosen = [choice(points, limit) for limit in limits]
    for (less, more), (low, high) in zip(
        itertools.pairwise(chosen), itertools.pairwise(limits), strict=True
    ):
        assert low > high or less.peak <= more.peak
        assert low > high or more.peak > high or less.peak > low or more.time_us <= less.time_us


@pytest.mark.parametrize("model", [Blocks(4), Blocks(2)])
def test_less_budget_is_never_a_higher_peak(model: nn.Module) -> None:
    points = points_of(model, torch.randn(300, 16))
    assert_never_higher(points)
    assert min(p.peak for p in points) < points[0].peak


def test_less_budget_is_never_a_higher_peak_of_a_transformer() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Block(16, 2) for _ in range(3)))

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


def unplanned(plan: object, graph: torch.fx.GraphModule) -> Callable[[list[Any]], Any]:
    """An engine that runs the graph itself, and leaves the plans in the record."""
    return lambda args: torch.fx.Interpreter(graph).boxed_run(args)


def peak_of(record: Compilation) -> int:
    forward, backward = (record.flat[name] for name in ("forward", "backward"))
    hints = {**size_hints(forward), **size_hints(backward)}
    plans = record.plans["forward"], record.plans["backward"]
    return scheduled_peak(*plans, kept(forward, backward), hints)


@pytest.mark.parametrize("budget", [1.0, 0.75])
def test_the_peak_that_is_told_is_that_of_the_plans(budget: float) -> None:
    _, record = step(Blocks(4), torch.randn(512, 16), engine=unplanned, memory_budget=budget)
    assert record.trade is not None
    assert record.trade.chosen.peak == peak_of(record)


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


# --- where


def test_dynamic_sizes_are_taken_at_their_hints() -> None:
    model = Blocks(4)
    records: list[Compilation] = []
    torch._dynamo.reset()
    compiler = Compiler(engine="aten", memory_budget=0.75, on_compiled=records.append, strict=True)
    run = torch.compile(model, backend=compiler, dynamic=True)
    for rows in (512, 40):
        x = torch.randn(rows, 16)
        expected = in_float64(model, x)
        model.zero_grad()
        loss = run(x)
        loss.backward()
        assert_close([loss.detach(), *(p.grad for p in model.parameters())], expected)
    (record,) = records  # one graph for both
    fixed = traded(model, torch.randn(512, 16), memory_budget=0.75)
    assert record.trade is not None
    assert record.trade.unconstrained.peak == fixed.unconstrained.peak


class Checkpointed(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return x.square().mean()


def test_what_the_user_checkpoints_runs_again_at_any_budget() -> None:
    model, x = Checkpointed(3), torch.randn(50, 16)
    expected = in_float64(model, x)
    for budget in (1.0, SMALLEST):
        found, _ = step(model, x, memory_budget=budget)
        assert_close(found, expected)


class Counting(Blocks):
    """Changes a buffer that it has read."""

    def __init__(self) -> None:
        super().__init__(3)
        self.register_buffer("scale", torch.ones(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.scale)
        self.scale.mul_(0.5)
        return super().forward(x)


def test_what_reads_a_buffer_that_changes_does_not_run_again() -> None:
    model, x = Counting(), torch.randn(50, 16)
    expected = in_float64(model, x)
    model.scale.fill_(1.0)  # type: ignore[operator]
    found, _ = step(model, x, memory_budget=SMALLEST)
    assert_close(found, expected)


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
