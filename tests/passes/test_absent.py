"""Tangents taken out of backward graphs: what folds away, what stays, and equal values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from iocompiler.graph import view
from iocompiler.passes.absent import fold

aten = torch.ops.aten
Function = Callable[..., tuple[Tensor, ...]]


def traced(f: Function, *inputs: Tensor, symbolic: bool = False) -> GraphModule:
    return make_fx(f, tracing_mode="symbolic" if symbolic else "fake")(*inputs)


def folded(f: Function, *inputs: Tensor, absent: tuple[int, ...] = (0,), **how: bool) -> list[str]:
    """Fold and run: equal to the whole graph with zeros; the operators that are left."""
    gm = traced(f, *inputs, **how)
    fold(gm, absent)
    zeros = [torch.zeros_like(x) if at in absent else x for at, x in enumerate(inputs)]
    results = gm(*(x for at, x in enumerate(inputs) if at not in absent))
    for ours, theirs in zip(results, f(*zeros), strict=True):
        torch.testing.assert_close(ours, theirs)
    gm.graph.lint()
    return [str(node.target).removeprefix("aten.") for node in view.calls(gm)]


A, B = torch.randn(4, 6), torch.randn(4, 6)


@pytest.mark.parametrize(
    "function",
    [
        lambda t, u: (aten.add.Tensor(t, u),),
        lambda t, u: (aten.add.Tensor(u, t, alpha=3),),
        lambda t, u: (aten.sub.Tensor(u, t),),
        lambda t, u: (aten.add.Tensor(aten.mul.Tensor(aten.neg.default(t), u), u),),
        lambda t, u: (aten.add.Tensor(aten.mm.default(t, u.new_ones(6, 6)), u),),
        lambda t, u: (aten.add.Tensor(u, aten.sum.dim_IntList(t, [0], True)),),
        lambda t, u: (aten.add.Tensor(aten.where.self(u > 0, t, torch.zeros(())), u),),
        lambda t, u: (aten.add.Tensor(aten.cat.default([t, t], 0)[:4], u),),
        lambda t, u: (aten.add.Tensor(aten.split.Tensor(t, 2)[1].sum(), u),),
        lambda t, u: (aten.add.Tensor(aten.tanh_backward.default(t, u), u),),
        lambda t, u: (aten.add.Tensor(aten.div.Tensor(t, u), u),),
        lambda t, u: (aten.addmm.default(u, t, u.new_ones(6, 6), alpha=2),),
        lambda t, u: (aten.addmm.default(u[0], t, u.new_ones(6, 6)),),
        lambda t, u: (aten.baddbmm.default(u[None], t[None], u.new_ones(1, 6, 6)),),
        lambda t, u: (torch.ops.prims.fma(t, u, u),),
        # one row for all rows: the result is as large as it was
        lambda t, u: (aten.add.Tensor(t, u[:1]),),
        lambda t, u: (aten.add.Tensor(t, u.to(torch.bfloat16)),),
    ],
)
def test_what_is_absent_leaves_nothing(function: Function) -> None:
    assert not {
        "full.default",
        "add.Tensor",
        "mul.Tensor",
        "mm.default",
        "addmm.default",
        "fma.default",
    } & set(folded(function, A, B))


@pytest.mark.parametrize(
    "function",
    [
        lambda t, u: (aten.exp.default(t) + u,),
        lambda t, u: (aten.div.Tensor(u, t + 1),),
        lambda t, u: (aten.add.Tensor(t, 1.0) + u,),
        lambda t, u: (aten.where.self(u > 0, t, u),),
        lambda t, u: (aten.cat.default([t, u]),),
        lambda t, u: (aten.sub.Tensor(t, u),),
        lambda t, u: (aten.add.Tensor(t, u, alpha=2),),
        lambda t, u: (aten.constant_pad_nd.default(t, [1, 1], 2.0) + u[:, :1],),
        lambda t, u: (aten.index_put.default(u, [torch.arange(4)], t),),
        lambda t, u: (aten.tanh_backward.default(u, t),),
        lambda t, u: (aten.addmm.default(t, u, u.new_ones(6, 6)),),
        lambda t, u: (aten.addmm.default(u, t, u.new_ones(6, 6), beta=2),),
        lambda t, u: (aten.slice_scatter.default(u, t[:, :2], 1, 0, 2),),
    ],
)
def test_what_needs_it_reads_a_constant(function: Function) -> None:
    assert "full.default" in folded(function, A, B)


def test_a_result_that_hangs_on_nothing_else_is_zero() -> None:
    assert folded(lambda t, u: (t.sum(0), u), A, B) == ["full.default"]


def test_added_in_places() -> None:
    def f(t: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        rows = torch.arange(2)
        into = aten.index_put.default(u, [rows], t[:2], True)
        new = aten.index_put.default(torch.zeros_like(u), [rows], t[:2], True)
        return aten.mul.Tensor(into, 2), aten.add.Tensor(new, u)

    assert [n for n in folded(f, A, B) if "index" in n or "add" in n] == []


def test_nothing_times_infinity_is_nothing() -> None:
    gm = traced(lambda t, u: (aten.add.Tensor(aten.mul.Tensor(t, u), u),), A, B)
    fold(gm, (0,))
    u = torch.full_like(B, float("inf"))
    (result,) = gm(u)
    assert torch.equal(result, u)


def test_strides_are_those_of_before() -> None:
    def f(t: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return (aten.view.default(aten.add.Tensor(t, u.t()), [24]),)

    gm = traced(f, A, torch.randn(6, 4))
    fold(gm, (0,))
    u = torch.randn(6, 4)
    torch.testing.assert_close(gm(u)[0], u.t().reshape(-1))


def test_sizes_are_read_from_the_others() -> None:
    def f(t: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return aten.exp.default(t).reshape(-1), t.sum() + u, u.new_zeros(t.shape[0]) + u[:, 0]

    assert "full.default" in folded(f, A, B, symbolic=True)


def test_two_of_three() -> None:
    def f(t: Tensor, u: Tensor, v: Tensor) -> tuple[Any, ...]:
        return aten.add.Tensor(aten.add.Tensor(t, u), v), aten.mul.Tensor(t, v)

    found = folded(f, A, B, A + B, absent=(0, 1))
    assert found == ["full.default"]
