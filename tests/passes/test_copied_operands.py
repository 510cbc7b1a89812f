"""Copies that only products read: which are left out, which stay, and the results."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from iocompiler.convenience import explain
from iocompiler.graph import view
from iocompiler.graph.normalise import normalise
from iocompiler.ops import target
from iocompiler.passes.late_copies import late_copies
from iocompiler.pipeline import Pipeline

Captured = Callable[..., GraphModule]
aten = torch.ops.aten
COPIES = (aten.contiguous.default, aten.clone.default)


def some(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape)


def copies(captured: Captured, f: Callable[..., Any], given: tuple[Tensor, ...]) -> int:
    """How many are left, of a graph that computes what it did, laid out as it was."""
    gm = captured(f, *given)
    with target.planned_for((9, 0)):
        Pipeline(normalise, late_copies).run(gm)
    ours, theirs = ([x.clone() for x in given] for _ in range(2))
    names = [f"L_{name}_" for name in inspect.signature(f).parameters]
    mine = dict(zip(names, ours, strict=True))
    found = gm(*(mine[str(node.target)] for node in gm.graph.find_nodes(op="placeholder")))
    expected = f(*theirs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert one.stride() == other.stride()
    return len(list(view.calls(gm, *COPIES)))


X, W, SQUARE = some(4, 8, 16), some(24, 16), some(16, 16)
LEFT_OUT: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "a weight": (lambda x, w: F.linear(x, w.t().contiguous()), (X, SQUARE)),
    "a weight, of matmul": (lambda x, w: x @ w.t().contiguous(), (X, W)),
    "rows": (lambda x, w: F.linear(x.clone(), w), (X, W)),
    "rows of a part": (lambda x, w: F.linear(x[..., :16].contiguous(), w), (some(4, 8, 32), W)),
    "columns": (lambda x, w: x.t().contiguous() @ w, (some(16, 8), W.t().contiguous())),
    "matrices": (lambda x: x.transpose(1, 2).contiguous() @ x, (X,)),
    "matrices of more dims": (
        lambda x: x.transpose(2, 3).contiguous() @ x,
        (some(2, 3, 8, 16),),
    ),
    "turned again": (lambda x, w: x @ w.t().contiguous().t(), (X, SQUARE)),
    "one for two products": (
        lambda x, w: [x @ (c := w.t().contiguous()), F.linear(x, c)][0] * 2 + F.linear(x, c),
        (X, SQUARE),
    ),
    "both operands": (lambda w: (c := w.t().clone()) @ c, (SQUARE,)),
    "with a bias": (
        lambda b, x, w: torch.addmm(b, x.t().contiguous(), w),
        (some(24), some(16, 8), W.t().contiguous()),
    ),
}


def written(x: Tensor, w: Tensor) -> Tensor:
    copy = w.t().contiguous()
    w.mul_(2)
    return x @ copy + w.sum()


def written_copy(x: Tensor, w: Tensor) -> Tensor:
    copy = x.clone()
    copy[0] = 0
    return F.linear(copy, w)


STAY: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "a result": (lambda x, w: (x @ (c := w.t().contiguous()), c), (X, W)),
    "read by another too": (
        lambda x, w: x @ (c := w.t().contiguous()) + torch.logcumsumexp(c, 1).sum(),
        (X, W),
    ),
    "the original is written": (written, (X, SQUARE)),
    "the copy is written": (written_copy, (X, W)),
    "rows that do not follow": (
        lambda x, w: F.linear(x.transpose(0, 1).contiguous(), w).relu_().sum(),
        (X, W),
    ),
    "neither rows nor columns": (
        lambda x, w: F.linear(x[..., ::2].contiguous(), w),
        (some(4, 8, 32), W),
    ),
    "rows that are not aligned": (
        lambda x, w: F.linear(x[..., :16].contiguous(), w),
        (some(4, 8, 17), W),
    ),
    "one that begins between": (
        lambda x, w: F.linear(x[..., 1:17].contiguous(), w),
        (some(4, 8, 32), W),
    ),
    "one row again and again": (
        lambda x, w: F.linear(x.expand(8, 16).contiguous(), w),
        (some(1, 16), W),
    ),
    "of a bias": (
        lambda b, x, w: torch.addmm(b.t().contiguous(), x, w),
        (some(24, 8), some(8, 16), W.t().contiguous()),
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out(captured: Captured, name: str) -> None:
    assert copies(captured, *LEFT_OUT[name]) == 0


@pytest.mark.parametrize("name", STAY)
def test_stay(captured: Captured, name: str) -> None:
    assert copies(captured, *STAY[name]) == 1


def test_a_cpu_keeps_them(captured: Captured) -> None:
    f, given = LEFT_OUT["a weight"]
    assert late_copies(captured(f, *given)) == 0


def test_the_report_names_what_is_left_of_each_copy() -> None:

    def two(x: Tensor, w: Tensor) -> Any:
        return x @ w.t().contiguous(), w[:32].t().contiguous()

    report = explain(two, some(64, 128), some(64, 128), device="h200")
    (row,) = report.copies
    assert (row.asked, row.kept) == (2, 1)
    assert row.bytes == 2 * 4 * 128 * (64 + 32)
    assert row.bytes_kept == 2 * 4 * 128 * 32


def test_each_operator_of_a_line_has_its_own_bytes() -> None:
    def two(x: Tensor, w: Tensor) -> Any:
        return x.clone(), w.t().contiguous()

    report = explain(two, some(64, 128), some(256, 128), device="h200")
    left = {row.operator: (row.bytes, row.bytes_kept) for row in report.copies}
    assert left == {
        "clone": (2 * 4 * 64 * 128,) * 2,
        "contiguous": (2 * 4 * 256 * 128,) * 2,
    }
