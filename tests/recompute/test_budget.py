"""Training steps within a memory budget: gradients stay right, whatever runs again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from tests.models.zoo import CASES
from tests.recompute.stepping import (
    SMALLEST,
    Blocks,
    assert_close,
    assert_never_higher,
    gpt,
    in_float64,
    peak_of,
    step,
    traded,
    unplanned,
)

BUDGETS = (1.0, 0.6, SMALLEST)


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
    model, x = Blocks(2, dropout=0.5), torch.randn(256, 16)
    expected, _ = step(model, x, engine=engine, memory_budget=1.0)
    found, record = step(model, x, engine=engine, memory_budget=SMALLEST)
    assert record.trade is not None
    assert record.trade.again
    assert_close(found, expected)


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
    # of kernels with other schedules, other results are written over what dies
    assert record.trade.unconstrained.peak == pytest.approx(fixed.unconstrained.peak, rel=0.25)


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
