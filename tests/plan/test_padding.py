"""Matmuls with an odd number of columns: rows padded inside, the user's strides outside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import iocompiler as ioc
from iocompiler.plan import padding
from tests.plan.graphs import relative_error


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors on the CPU take part too."""
    monkeypatch.setattr(padding, "_SMALL", 1)
    monkeypatch.setattr(padding, "PADDED_DEVICES", ("cpu", "cuda"))


def compiled(fn, plans: list):
    def keep(compilation) -> None:
        plans.append(compilation)

    torch._dynamo.reset()
    return torch.compile(
        fn, backend=ioc.Compiler(engine="reference", strict=True, on_compiled=keep)
    )


def rows(plans: list) -> set[int]:
    """Row strides of the two-dimensional tensors the kernels and calls make."""
    return {
        spec.stride[0]
        for c in plans
        for plan in c.plans.values()
        for step in plan.steps
        for _, spec in getattr(step, "outputs", ())
        if spec is not None and len(spec.shape) == 2
    }


def test_logits_are_padded_and_returned_as_they_were() -> None:
    x = torch.randn(6, 16, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(37, 16, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randint(0, 37, (6,))

    def fn(x, w):
        logits = x @ w.t()
        return F.cross_entropy(logits.float(), y), logits

    plans: list = []
    run = compiled(fn, plans)
    loss, logits = run(x, w)
    want_loss, want_logits = fn(x, w)
    assert logits.stride() == want_logits.stride() == (37, 1)
    torch.testing.assert_close(logits, want_logits)
    got = torch.autograd.grad(loss, (x, w))
    exact = torch.autograd.grad(fn(x.double(), w.double())[0], (x, w))
    eager = torch.autograd.grad(want_loss, (x, w))
    for g, e, r in zip(got, eager, exact, strict=True):
        assert g.stride() == e.stride()
        assert relative_error(g, r) <= 3 * relative_error(e, r) + 1e-3
    assert 64 in rows(plans)


def test_aligned_rows_stay() -> None:
    plans: list = []
    x, w = torch.randn(6, 16, dtype=torch.bfloat16), torch.randn(16, 40, dtype=torch.bfloat16)
    torch.testing.assert_close(
        compiled(lambda x, w: (x @ w).relu() @ w.t(), plans)(x, w), (x @ w).relu() @ w.t()
    )
    assert rows(plans) <= {40, 16}


def test_a_view_that_needs_dense_rows_keeps_them() -> None:
    plans: list = []
    x, w = torch.randn(6, 16, dtype=torch.bfloat16), torch.randn(16, 35, dtype=torch.bfloat16)

    def fn(x, w):
        return (x @ w).view(-1) * 2

    torch.testing.assert_close(compiled(fn, plans)(x, w), fn(x, w))
    assert 64 not in rows(plans)
