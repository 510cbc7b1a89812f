"""The gradient of a table of few rows as masked sums: values, what is declined, any length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.ops import target
from iocompiler.plan.data import AtenStep
from tests.accuracy import compare_with_eager


class Typed(nn.Module):
    """Rows of a table chosen by numbers that are no index until the run."""

    def __init__(self, rows: int, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.kinds = nn.Embedding(rows, 5, **settings)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.sum(-1) > 0).long() * (self.kinds.num_embeddings - 1)
        return torch.tanh(self.kinds(ids) * x)


def calls(records: list[Compilation]) -> list[str]:
    steps = records[0].plans["backward"].steps
    return [step.target for step in steps if isinstance(step, AtenStep)]


def compiler(records: list[Compilation], dynamic: bool = False) -> Any:
    backend = Compiler(engine="reference", strict=True, on_compiled=records.append)
    return lambda module: torch.compile(module, backend=backend, dynamic=dynamic)


@pytest.mark.parametrize(
    ("rows", "settings", "dtype", "dynamic"),
    [
        (1, {}, torch.float32, False),
        (2, {}, torch.bfloat16, False),
        (3, {"padding_idx": 0}, torch.float32, True),
        (4, {"padding_idx": -1}, torch.bfloat16, False),
    ],
)
def test_gradients(rows: int, settings: dict[str, Any], dtype: torch.dtype, dynamic: bool) -> None:
    records: list[Compilation] = []
    given = {"x": torch.randn(3, 41, 5, requires_grad=True)}
    with target.planned_for((9, 0)):
        for each in compare_with_eager(
            lambda: Typed(rows, **settings),
            given,
            compiler(records, dynamic),
            dtype=dtype,
            device="cpu",
            train=True,
        ):
            assert each.ok, each
    assert not calls(records)


@pytest.mark.parametrize(
    ("rows", "settings", "planned"),
    [(5, {}, True), (2, {"scale_grad_by_freq": True}, True), (2, {}, False)],
)
def test_declined(rows: int, settings: dict[str, Any], planned: bool) -> None:
    """Many rows: our templates; a scale by frequency, a CPU: the library's."""
    records: list[Compilation] = []
    module = Typed(rows, **settings)
    x = torch.randn(3, 7, 5)
    run = compiler(records)(module)
    with target.planned_for((9, 0) if planned else None):
        run(x).sum().backward()
    many = "iocompiler.embedding_gradient.default"
    assert calls(records) == [many if rows == 5 else "aten.embedding_dense_backward.default"]


def test_what_is_not_finite_stays_in_its_row() -> None:
    ids = torch.tensor([0, 1, 1, 0, 2])
    weights = torch.tensor([1.0, torch.inf, 1.0, 2.0, torch.nan])[:, None]

    def gradient(run: Any) -> Tensor:
        table = torch.zeros(3, 4, requires_grad=True)
        run(table).backward()
        assert table.grad is not None
        return table.grad

    def f(table: Tensor) -> Tensor:
        return (F.embedding(ids, table) * weights).sum()

    with target.planned_for((9, 0)):
        got = gradient(torch.compile(f, backend=Compiler(engine="reference", strict=True)))
    torch.testing.assert_close(got, gradient(f), equal_nan=True, rtol=0, atol=0)
