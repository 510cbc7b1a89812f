"""Matmuls with an odd number of columns: rows padded inside, the user's strides outside."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import iocompiler as ioc
from iocompiler.cost_model import roofline
from iocompiler.cost_model.device import DEVICES
from iocompiler.plan import padding
from iocompiler.plan.data import AtenStep, Plan
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


def large(plan: Plan, elements: int) -> list[str]:
    """Names of the tensors of so many elements that a plan makes."""
    return [
        name
        for step in plan.steps
        for name, spec in getattr(step, "outputs", ())
        if spec is not None and math.prod(spec.shape) == elements
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_logits_that_are_returned_are_once_in_memory(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "UNALIGNED", 1e-9)  # so small a product is too slow otherwise
    x = torch.randn(6, 16, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(37, 16, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(37, dtype=torch.bfloat16) if bias else None
    y = torch.randint(0, 37, (6,))

    def fn(x, w, b):
        logits = F.linear(x, w, b)
        return F.cross_entropy(logits.float(), y), logits

    plans: list = []
    run = compiled(fn, plans)
    loss, logits = run(x, w, b)
    want_loss, want_logits = fn(x, w, b)
    assert logits.stride() == want_logits.stride() == (37, 1)
    torch.testing.assert_close(logits, want_logits)
    got = torch.autograd.grad(loss, (x, w))
    exact = torch.autograd.grad(
        fn(x.double(), w.double(), None if b is None else b.double())[0], (x, w)
    )
    eager = torch.autograd.grad(want_loss, (x, w))
    for g, e, r in zip(got, eager, exact, strict=True):
        assert g.stride() == e.stride()
        assert relative_error(g, r) <= 3 * relative_error(e, r) + 1e-3
    (made,) = plans
    (name,) = large(made.plans["forward"], 6 * 37)
    (step,) = (
        s
        for s in made.plans["forward"].steps
        if isinstance(s, AtenStep) and s.target == "iocompiler.aligned_mm.default"
    )
    assert step.outputs[0][0] == name
    assert step.args[-1] == 37
    # what the loss saves are those logits; their gradient has padded rows
    assert large(made.plans["backward"], 6 * 37)
    assert 64 in rows(plans)


def test_logits_that_only_a_loss_reads_have_padded_rows() -> None:
    x = torch.randn(6, 16, dtype=torch.bfloat16)
    w = torch.randn(37, 16, dtype=torch.bfloat16)
    plans: list = []

    def fn(x, w):
        return (x @ w.t()).float().logsumexp(-1)

    torch.testing.assert_close(compiled(fn, plans)(x, w), fn(x, w), rtol=1e-2, atol=1e-2)
    assert 64 in rows(plans)


def test_logits_that_another_product_reads_too_are_copied() -> None:
    x = torch.randn(6, 16, dtype=torch.bfloat16)
    w = torch.randn(37, 16, dtype=torch.bfloat16)
    plans: list = []

    def fn(x, w):
        logits = x @ w.t()
        return logits, logits @ w

    for got, want in zip(compiled(fn, plans)(x, w), fn(x, w), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-1)
        assert got.stride() == want.stride()
    assert len(large(plans[0].plans["inference"], 6 * 37)) == 2


def test_a_scratch_must_be_worth_its_copy() -> None:
    """A head as GPT-2's goes through it; with next to nothing to sum, the copy costs more."""

    def target(width: int, device: str) -> str:
        with FakeTensorMode():
            x = torch.empty(8192, width, dtype=torch.bfloat16, device="cuda")
            w = torch.empty(50257, width, dtype=torch.bfloat16, device="cuda")
            gm = make_fx(lambda x, w: (torch.mm(x, w.t()),))(x, w)
            padding.pad_rows(gm, None, DEVICES[device])
        (node,) = (n for n in gm.graph.nodes if "mm" in str(n.target))
        assert node.meta["val"].stride() == (50257, 1)
        return str(node.target)

    assert target(768, "h200") == "iocompiler.aligned_mm.default"
    assert target(768, "l40s") == "iocompiler.aligned_mm.default"
    assert target(8, "l40s") == "aten.mm.default"


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
