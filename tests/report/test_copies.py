"""Copies the program asks for, and those that are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from iocompiler.backend import Compiler
from iocompiler.plan.data import Plan
from iocompiler.report.copies import NOT_ASKED, copied
from iocompiler.report.explain import explain
from iocompiler.report.ledger import Copied
from iocompiler.report.save import as_json, from_json


def rows(function: Callable[..., Any], *inputs: torch.Tensor) -> list[Copied]:
    class Model(nn.Module):
        def forward(self, *given: torch.Tensor) -> Any:
            return function(*given)

    report = explain(Model(), *inputs, device="h200", compile_kernels=False)
    assert from_json(as_json(report)).copies == report.copies
    return list(report.copies)


X = torch.randn(4, 6)
SIZE = 2 * 24 * 4


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: x.t().contiguous() * 2, "contiguous"),
        (lambda x: x.t().reshape(-1).exp(), "reshape"),
        (lambda x: x.clone().sum(0), "clone"),
        (lambda x: (x.t().contiguous() + 1).contiguous(), "contiguous"),
    ],
)
def test_copies_that_are_gone(function: Callable[..., Any], operator: str) -> None:
    (row,) = rows(function, X)
    assert row == Copied(operator, row.where, 1, SIZE, 0, 0)
    assert row.where.startswith("test_copies.py:")


def test_a_copy_that_is_returned_is_left() -> None:
    (row,) = rows(lambda x: x.t().contiguous(), X)
    assert (row.asked, row.kept, row.bytes_kept) == (1, 1, SIZE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_so_is_one_of_any_dtype(dtype: torch.dtype) -> None:
    """Short floats are widened on their way."""
    (row,) = rows(lambda x: x.t().contiguous(), X.to(dtype))
    assert (row.asked, row.kept, row.bytes_kept) == (1, 1, 2 * 24 * dtype.itemsize)


def test_a_kernel_that_rounds_is_no_copy() -> None:
    assert not rows(lambda x: x.bfloat16().float(), X)


def test_views_are_no_copies() -> None:
    assert not rows(lambda x: x.reshape(24).exp() + x.contiguous().flatten(), X)


def test_what_is_broadcast_is_read_once() -> None:
    (row,) = rows(lambda x: x.expand(3, 4, 6).reshape(-1, 6).exp(), X)
    assert row.bytes == (24 + 72) * 4


def test_equal_lines_are_one_row() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x.t().contiguous().exp()
        return x

    (row,) = rows(twice, X)
    assert (row.asked, row.kept) == (2, 0)


def test_what_nobody_asks_for() -> None:
    plans: list[Plan] = []

    def engine(plan: Plan, flat: Any) -> Callable[[list[Any]], Any]:
        plans.append(plan)
        return lambda args: torch.fx.Interpreter(flat).boxed_run(args)

    torch._dynamo.reset()
    torch.compile(lambda x: x.t().contiguous(), backend=Compiler(engine=engine))(X)
    (row,) = copied((), [(plans[0], {})])
    assert (row.operator, row.asked, row.kept, row.bytes_kept) == (NOT_ASKED, 0, 1, SIZE)
