"""Attention whose probabilities are read too: the output is tiled where a gradient may flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.passes.attention.reading import contraction
from tests.passes.attention_cases import Compiled, Taken, heads, in_float32
from tests.passes.test_attention_rows import SINKS, above, beside, check


def returned(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return p @ v, p


def as_in_hugging_face(q, k, v, mask):
    s = torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask
    p = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)
    p = F.dropout(p, p=0.0, training=True)
    return torch.matmul(p, v).transpose(1, 2).contiguous(), p


def averaged(q, k, v):
    s = (q @ k.mT).masked_fill(above(q @ k.mT), float("-inf"))
    p = s.softmax(-1)
    return p @ v, p.mean(1)


def by_hand_with_lse(q, k, v):
    s = q @ k.mT
    lse = s.logsumexp(-1, keepdim=True)
    p = torch.exp(s - lse)
    return p @ v, p, lse


def with_sink(q, k, v, sink):
    p = beside(q, q @ k.mT, sink).softmax(-1)[..., :-1]
    return p @ v, p


def of_sigmoid(q, k, v):
    p = torch.sigmoid(q @ k.mT)
    return p @ v, p


def looked_at(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return p @ v + p.detach().amax(-1, keepdim=True)


TAKEN: list[Taken] = [
    (returned, heads(), "full"),
    (as_in_hugging_face, {**heads(), "mask": torch.zeros(2, 1, 7, 7)}, "bias"),
    (averaged, heads(), "causal"),
    (by_hand_with_lse, heads(), "program+lse"),
    (with_sink, {**heads(), "sink": SINKS.clone().requires_grad_()}, "program+sink"),
    (of_sigmoid, heads(), "program+sigmoid"),
    (looked_at, heads(), "full"),
]


@pytest.mark.parametrize(
    ("function", "inputs", "variant", "dtype"),
    in_float32(TAKEN, as_in_hugging_face, by_hand_with_lse, of_sigmoid),
)
def test_taken(
    function: Callable[..., Any], inputs: dict[str, Tensor], variant: str, dtype: torch.dtype
) -> None:
    """With a gradient of each result."""
    if function is as_in_hugging_face:
        inputs = {**inputs, "mask": inputs["mask"].to(dtype)}
    compiled = check(function, inputs, dtype)
    assert compiled.variants == [variant + "+weights"], compiled.misses
    products = [
        n for g in compiled.graphs for n in g.graph.nodes if n.target in contraction.TARGETS
    ]
    assert len(products) == 1  # the scores


def test_the_weights_need_no_gradient() -> None:
    compiled, inputs = Compiled(returned), heads()
    out, _ = compiled(**inputs)
    found = torch.autograd.grad(out.square().sum(), list(inputs.values()))
    wanted = torch.autograd.grad(returned(**inputs)[0].square().sum(), list(inputs.values()))
    for one, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, true)


def used(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return p @ v + p.amax(-1, keepdim=True)


def into_one_loss(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return (p @ v).square().sum() - (p * (p + 1e-6).log()).sum()


def dropped(q, k, v):
    p = F.dropout((q @ k.mT).softmax(-1), 0.5)
    return p @ v, p


def late(q, k, v):
    e = torch.exp(q @ k.mT)
    return (e @ v) / e.sum(-1, keepdim=True), e


@pytest.mark.parametrize("function", [used, into_one_loss, dropped, late], ids=lambda f: f.__name__)
def test_declined(function: Callable[..., Any]) -> None:
    compiled, inputs = Compiled(function), heads()
    torch.manual_seed(0)
    out = compiled(**inputs)
    torch.manual_seed(0)
    torch.testing.assert_close(out, function(**inputs))
    assert compiled.variants == []
    assert len(compiled.misses) == 1


def test_without_gradients_the_product_stays() -> None:
    inputs = {name: x.detach() for name, x in heads().items()}
    for grad, given in ((True, inputs), (False, heads())):
        compiled = Compiled(returned)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(**given), returned(**given))
        assert compiled.variants == []
        assert "costs no more" in compiled.misses[0]
