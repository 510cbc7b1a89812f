"""Masks that are made before checkpointed regions are made in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from iocompiler.graph import view
from tests.compiling import check, compiled, grad

aten = torch.ops.aten
Captured = Callable[..., GraphModule]


def _region(function: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False)


def _masked(x: Tensor, keeps: Tensor) -> Tensor:
    return (x @ x.transpose(-1, -2)).masked_fill(~keeps, float("-inf")).softmax(-1) @ x


def _attended(x: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def _causal(x: Tensor) -> Tensor:
    at = torch.arange(x.shape[-2], device=x.device)
    return at[None, :] <= at[:, None]


def from_sizes(x: Tensor, tokens: Tensor) -> Tensor:
    return _region(_masked, x, _causal(x)).sum()


def of_the_tokens(x: Tensor, tokens: Tensor) -> Tensor:
    keeps = _causal(x) & (tokens != 0)[:, None, None, :]
    return _region(_masked, x, keeps).sum()


def in_numbers(x: Tensor, tokens: Tensor) -> Tensor:
    """As masks that are added are made: of a constant of the graph's."""
    bias = torch.where(_causal(x), torch.tensor(0.0), -1e30).to(x.dtype)
    return _region(_attended, x, bias).sum()


def in_two_regions(x: Tensor, tokens: Tensor) -> Tensor:
    keeps = _causal(x) & (tokens != 0)[:, None, None, :]
    for _ in range(2):
        x = x + _region(_masked, x, keeps)
    return x.sum()


def beside_what_it_is_made_of(x: Tensor, tokens: Tensor) -> Tensor:
    at = torch.arange(x.shape[-2], device=x.device)
    return _region(lambda x, at, k: _masked(x, k) * at[:, None], x, at, at <= at[:, None]).sum()


def in_a_region_of_a_region(x: Tensor, tokens: Tensor) -> Tensor:
    def outer(x: Tensor, keeps: Tensor) -> Tensor:
        return _region(_masked, x.sin(), keeps).cos()

    return _region(outer, x, _causal(x)).sum()


def read_outside_too(x: Tensor, tokens: Tensor) -> Tensor:
    keeps = _causal(x)
    return (_region(_masked, x, keeps) * keeps.sum(-1)[:, None]).sum()


TAKEN = {f.__name__: f for f in (
    from_sizes, of_the_tokens, in_numbers, in_two_regions, beside_what_it_is_made_of,
    in_a_region_of_a_region, read_outside_too,
)}  # fmt: skip


def from_values(x: Tensor, tokens: Tensor) -> Tensor:
    return _region(_masked, x, (x.detach().sum(-1) < 99.0)[..., None, :]).sum()


def by_chance(x: Tensor, tokens: Tensor) -> Tensor:
    keeps = torch.randint(0, 1, x.shape[-2:-1]) == 0
    return _region(_masked, x, keeps).sum()


def of_what_is_written(x: Tensor, tokens: Tensor) -> Tensor:
    tokens = tokens.clone()
    keeps = _causal(x) & (tokens != 0)[:, None, None, :]
    tokens.zero_()
    return _region(_masked, x, keeps).sum() + tokens.sum()


def under_other_casts(x: Tensor, tokens: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        at = torch.arange(x.shape[-2])
        far = at.float()[:, None] @ at.float()[None, :]  # in bfloat16: 17 * 17 is 288
    return _region(_masked, x, far <= 289.0).sum()


DECLINED = {f.__name__: f for f in (
    from_values, by_chance, of_what_is_written, under_other_casts,
)}  # fmt: skip


def _inputs() -> tuple[Tensor, Tensor]:
    tokens = torch.ones(2, 18, dtype=torch.int64)
    tokens[0, 11:] = 0
    return grad(2, 3, 18, 4), tokens


def _given(gm: GraphModule) -> list[tuple[int, ...]]:
    """The shapes of what regions are given, down into them."""
    found: list[tuple[int, ...]] = []
    for node, inner in view.checkpoints(gm):
        tensors = [x for read in node.all_input_nodes[1:] for x in view.tensors(read)]
        found += [tuple(map(int, x.shape)) for x in tensors]
        found += _given(inner)
    return found


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", TAKEN)
def test_masks_are_made_inside(captured: Captured, name: str, dynamic: bool | None) -> None:
    gm = captured(TAKEN[name], *_inputs(), dynamic=dynamic)
    gm.graph.lint()
    assert view.checkpoints(gm)
    assert set(_given(gm)) <= {(2, 3, 18, 4), (2, 18)}  # x, and the tokens
    for _, inner in view.checkpoints(gm):
        inner.graph.lint()
        for node in inner.graph.nodes:
            assert "val" in node.meta or node.op in ("output", "get_attr")


@pytest.mark.parametrize("name", DECLINED)
def test_what_has_to_be_given_is(captured: Captured, name: str) -> None:
    gm = captured(DECLINED[name], *_inputs())
    assert any(shape[-1] == 18 for shape in _given(gm))


@pytest.mark.parametrize("engine", ["auto", "aten", "reference"])
@pytest.mark.parametrize("name", [*TAKEN, *DECLINED])
def test_results_and_gradients(engine: str, name: str) -> None:
    function = {**TAKEN, **DECLINED}[name]
    (x, tokens), (other, _) = _inputs(), _inputs()
    with torch.no_grad():
        other.copy_(x)
    run, records = compiled(function, engine=engine)
    torch.manual_seed(1)
    found = torch.autograd.grad(run(x, tokens), x)
    torch.manual_seed(1)
    exact = other.detach().double().requires_grad_()
    wanted = torch.autograd.grad(function(exact, tokens), exact)
    torch.testing.assert_close(found[0].double(), wanted[0], atol=2e-5, rtol=1e-4)
    assert not records[0].fallbacks


def test_sizes_that_change(captured: Captured) -> None:
    run, records = compiled(of_the_tokens, engine="reference", dynamic=True)
    for length in (5, 18, 33):
        x, tokens = grad(2, 3, length, 4), torch.ones(2, length, dtype=torch.int64)
        tokens[1, length // 2 :] = 0
        found, wanted = (torch.autograd.grad(f(x, tokens), x)[0] for f in (run, of_the_tokens))
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert len(records) == 1


def test_an_attention_inside_is_causal() -> None:
    def layer(x: Tensor, keeps: Tensor) -> Tensor:
        return _attended(x.sin(), keeps)

    def f(x: Tensor) -> Tensor:
        return _region(layer, x, _causal(x)).sum()

    records = check(f, grad(2, 3, 300, 64), engine="reference")
    assert [(r.pattern, r.variant) for r in records[0].rewrites] == [("attention", "causal")]


def test_what_is_made_in_two_regions_is_made_once() -> None:
    """In the forward, and once again in the backward."""

    def f(x: Tensor, tokens: Tensor) -> Tensor:
        places = tokens.cumsum(-1)
        for _ in range(2):
            x = x + _region(lambda x, at: (x * at[:, None, :, None]).sin(), x, places)
        return x.sum()

    x, tokens = _inputs()
    run, records = compiled(f, engine="reference")
    run(x, tokens).backward()
    for name in ("forward", "backward"):
        targets = [node.target for node in view.calls(records[0].flat[name])]
        assert targets.count(aten.cumsum.default) == 1
