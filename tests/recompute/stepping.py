"""Small models, one training step of them under a budget, and what must hold of its trade."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.errors import BudgetWarning
from iocompiler.plan.build import size_hints
from iocompiler.plan.peak import kept, scheduled_peak
from iocompiler.recompute.budget import choice
from iocompiler.recompute.trade import Point, Trade
from tests.models.gpt import GPT

SMALLEST = 1  # bytes: nothing fits


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


def assert_never_higher(points: tuple[Point, ...]) -> None:
    highest = max(point.peak for point in points)
    limits = [*range(0, highest + 2, max(1, highest // 200)), highest]
    chosen = [choice(points, limit) for limit in limits]
    for (less, more), (low, high) in zip(
        itertools.pairwise(chosen), itertools.pairwise(limits), strict=True
    ):
        assert low > high or less.peak <= more.peak
        assert low > high or more.peak > high or less.peak > low or more.time_us <= less.time_us


def unplanned(plan: object, graph: torch.fx.GraphModule) -> Callable[[list[Any]], Any]:
    """An engine that runs the graph itself, and leaves the plans in the record."""
    return lambda args: torch.fx.Interpreter(graph).boxed_run(args)


def peak_of(record: Compilation) -> int:
    forward, backward = (record.flat[name] for name in ("forward", "backward"))
    hints = {**size_hints(forward), **size_hints(backward)}
    plans = record.plans["forward"], record.plans["backward"]
    return scheduled_peak(*plans, kept(forward, backward), hints)
