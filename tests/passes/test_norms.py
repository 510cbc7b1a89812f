"""Norms of many inputs in one call: what is taken, what is left alone, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from iocompiler.graph.capture import capture
from iocompiler.ops import target
from iocompiler.passes.norms import norms_together
from iocompiler.plan.data import AtenStep
from tests.compiling import compiled

aten = torch.ops.aten
Captured = Callable[..., GraphModule]
SHAPES = ((5, 7), (33,), (4, 4, 3), (), (129, 17))


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def rewritten(gm: GraphModule) -> tuple[GraphModule, int]:
    with target.planned_for((9, 0)):
        sites = norms_together(gm)
    gm.graph.lint()
    gm.recompile()
    return gm, sites


def _written_after(*x: Tensor) -> Tensor:
    norms = [each.norm() for each in x]
    for each, norm in zip(x, norms, strict=True):
        each.div_(norm)
    return torch.stack([*norms, x[0].sum()])


TAKEN: dict[str, Callable[..., Any]] = {
    "torch.norm": lambda *x: torch.norm(torch.stack([torch.norm(each, 2) for each in x]), 2),
    "method": lambda *x: torch.stack([each.norm() for each in x]).norm(),
    "detached": lambda *x: torch.stack([each.detach().norm(2.0) for each in x]).norm(),
    "one": lambda *x: sum([torch.linalg.vector_norm(each, 1) for each in x]),
    "maximum": lambda *x: torch.stack([each.norm(float("inf")) for each in x]).max(),
    "squares": lambda *x: sum([each.norm() ** 2 for each in x]) ** 0.5,
    "written after": _written_after,
    "views": lambda *x: torch.stack([each.view(-1).norm() for each in x]).sum(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", TAKEN)
def test_taken(captured: Captured, name: str, dtype: torch.dtype) -> None:
    x = tensors(dtype)
    gm, sites = rewritten(captured(TAKEN[name], *x))
    assert sites == len(x)
    assert [n.target for n in gm.graph.nodes].count(aten._foreach_norm.Scalar) == 1
    (found,) = gm(*map(torch.clone, x))
    assert found.dtype == dtype
    few = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, TAKEN[name](*x), **few)


def _written(*x: Tensor) -> Tensor:
    norms = []
    for each in x:
        each.mul_(0.5)
        norms.append(each.norm())
    return torch.stack(norms)


def _read_before_the_next_is_made(*x: Tensor) -> Tensor:
    total = x[0].norm()
    for each in x[1:]:
        total = total + (each * total).norm()
    return total


def _written_in_between(*x: Tensor) -> Tensor:
    """What the last is a view of is made when the first is written already."""
    norms = []
    for each in x:
        norms.append(each.view(-1).norm())
        each.mul_(0.5)
    return torch.stack(norms)


DECLINED: dict[str, Callable[..., Any]] = {
    "computed": lambda *x: torch.stack([each.exp().norm() for each in x]),
    "written": _written,
    "written in between": _written_in_between,
    "read before the next is made": _read_before_the_next_is_made,
    "few": lambda *x: torch.stack([each.norm() for each in x[:3]]),
    "of rows": lambda *x: torch.stack(
        [torch.linalg.vector_norm(each.reshape(1, -1), dim=-1).sum() for each in x]
    ),
    "another order": lambda *x: torch.stack([torch.linalg.vector_norm(each, 3) for each in x]),
    "another dtype": lambda *x: torch.stack(
        [torch.linalg.vector_norm(each, dtype=torch.float64) for each in x]
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(captured: Captured, name: str) -> None:
    _, sites = rewritten(captured(DECLINED[name], *tensors()))
    assert sites == 0


def test_on_a_cpu_nothing_changes(captured: Captured) -> None:
    assert norms_together(captured(TAKEN["method"], *tensors())) == 0


def test_gradients_are_eagers() -> None:
    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        graph, sites = rewritten(capture(gm, inputs))
        assert sites == len(SHAPES)
        return graph.forward

    ours, theirs = ([x.requires_grad_() for x in tensors()] for _ in range(2))
    torch._dynamo.reset()
    torch.compile(TAKEN["method"], backend=backend)(*ours).backward()
    TAKEN["method"](*theirs).backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_clipping_each_is_few_launches() -> None:
    parameters = [x.requires_grad_() for x in tensors()]
    other = [x.requires_grad_() for x in tensors()]
    for each in (*parameters, *other):
        each.grad = each.detach().cos()
    torch._dynamo.reset()
    clip = lambda: torch.nn.utils.clip_grad_norm_(parameters, 0.1, foreach=False)
    run, records = compiled(clip, engine="reference")
    with target.planned_for((9, 0)):
        norm = run()
    expected = torch.nn.utils.clip_grad_norm_(other, 0.1, foreach=False)
    torch.testing.assert_close(norm, expected)
    for one, two in zip(parameters, other, strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    (record,) = records
    called = [s for s in record.plans["inference"].steps if isinstance(s, AtenStep)]
    assert [step.target for step in called] == ["aten._foreach_norm.Scalar"]
