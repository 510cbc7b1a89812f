"""Equal calls made once: what is one, what stays two, gradients that are summed before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.graph.normalise import normalise
from iocompiler.passes.repeated import repeated
from iocompiler.plan.data import AtenStep
from tests.accuracy import compare_with_eager

Captured = Callable[..., GraphModule]
Spelling = Callable[[Tensor], Any]


def written(x: Tensor) -> Tensor:
    y = x * 2
    a = y.sin()
    y[0] = 0
    return a * y.sin()


@torch.library.custom_op("iocompiler_tests::counted", mutates_args=())
def counted(x: Tensor) -> Tensor:
    """As far as anybody knows, it counts its calls."""
    return x.clone()


@counted.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def two_modes(x: Tensor) -> Tensor:
    with torch.no_grad():
        a = x.sin()
    return a * x.sin()


# the calls that are made no more
TAKEN: dict[str, tuple[Spelling, int]] = {
    "pointwise": (lambda x: x.sin() + x.sin() * 2, 1),
    "a chain": (lambda x: torch.relu(x.exp() + 1) * torch.relu(x.exp() + 1).sum(), 3),
    "views": (lambda x: x.t().reshape(2, -1) @ x.t().reshape(2, -1).t(), 2),
    "lists": (lambda x: torch.cat([x, x]).sum() * torch.cat([x, x]), 1),
    "what is made": (lambda x: x * torch.arange(4) + torch.arange(4), 1),
    "an option by name": (
        lambda x: x.sum(1, dtype=torch.float64) * x.sum(1, dtype=torch.float64),
        1,
    ),
}

DECLINED: dict[str, Spelling] = {
    "other numbers": lambda x: (x + 1) * (x + 2),
    "other types of number": lambda x: torch.full_like(x, 1) + torch.full_like(x, True),
    "the other zero": lambda x: torch.full_like(x, 0.0) / torch.full_like(x, -0.0),
    "other dims": lambda x: x.sum(0)[:2] * x.sum(1)[:2],
    "random": lambda x: F.dropout(x, 0.5) + F.dropout(x, 0.5),
    "drawn": lambda x: torch.rand_like(x) - torch.rand_like(x),
    "both returned": lambda x: (x.sin(), x.sin()),
    "both returned, seen differently": lambda x: (x.sin().t(), x.sin()),
    "written in between": written,
    "two modes": two_modes,
    "an operator of the user's": lambda x: counted(x) + counted(x),
    "not written": lambda x: torch.empty_like(x).fill_(1) + torch.empty_like(x).fill_(2),
}


def rewritten(gm: GraphModule) -> tuple[int, int]:
    """How many calls the graph had after `normalise`, and how many fewer."""
    normalise(gm)
    before = len(gm.graph.nodes)
    sites = repeated(gm)
    gm.graph.lint()
    gm.recompile()
    assert len(gm.graph.nodes) == before - sites
    return before, sites


@pytest.mark.parametrize("name", TAKEN)
def test_taken(captured: Captured, name: str) -> None:
    f, count = TAKEN[name]
    x = torch.randn(4, 4)
    gm = captured(f, x)
    assert rewritten(gm)[1] == count
    torch.testing.assert_close(gm(x)[0], f(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", DECLINED)
def test_declined(captured: Captured, name: str) -> None:
    gm = captured(DECLINED[name], torch.randn(4, 4))
    kept = [node.target for node in gm.graph.nodes]
    assert rewritten(gm)[1] == 0, kept


class Buckets(nn.Module):
    """Every layer looks the same rows up, as tables of distances are."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            buckets = (torch.arange(7, device=x.device) * 5 % 11).unsqueeze(0)
            x = torch.tanh(layer(x) + self.table(buckets))
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_summed_first(dtype: torch.dtype) -> None:
    records: list[Compilation] = []

    def compiled(module: nn.Module) -> Any:
        backend = Compiler(engine="reference", strict=True, on_compiled=records.append)
        return torch.compile(module, backend=backend)

    given = {"x": torch.randn(5, 7, 6, requires_grad=True)}
    for each in compare_with_eager(Buckets, given, compiled, dtype=dtype, device="cpu", train=True):
        assert each.ok, each
    calls = [s.target for s in records[0].plans["backward"].steps if isinstance(s, AtenStep)]
    assert calls.count("aten.embedding_dense_backward.default") == 1
