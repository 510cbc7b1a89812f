"""Attention whose weights no softmax makes: sigmoid and ReLU attention, and what looks like it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iocompiler.ops.scored_attention import FORWARD
from iocompiler.tile.score import ScoreProgram, parsed
from tests.passes.attention_cases import Compiled, Taken, heads, in_float32
from tests.passes.test_attention_rows import above, check


def sigmoid_plain(q, k, v):
    return torch.sigmoid(q @ k.mT) @ v


def sigmoid_biased(q, k, v):
    s = q @ k.mT / math.sqrt(q.shape[-1]) - math.log(k.shape[-2])
    s = s.masked_fill(above(s), float("-inf"))
    return s.sigmoid().to(v.dtype) @ v


def sigmoid_of_heads(q, k, v, bias):
    s = torch.einsum("bhsd,bhtd->bhst", q, k) * 0.3 + bias.view(-1, 1, 1)
    return torch.einsum("bhst,bhtd->bshd", torch.sigmoid(s), v)


def sigmoid_masked_after(q, k, v, keep):
    p = torch.sigmoid((q @ k.mT).float() - 2.0)
    return (p * keep[:, None, None, :]).to(v.dtype) @ v


def sigmoid_added_mask(q, k, v, keep):
    mask = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, -1e9)[:, None, None, :]
    return torch.sigmoid(q @ k.mT + mask) @ v


def relu_of_length(q, k, v):
    return (F.relu(q @ k.mT * 0.3) / k.shape[-2]) @ v


def relu_causal(q, k, v):
    s = q @ k.mT
    keep = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    return torch.where(keep, s, torch.tensor(float("-inf"))).clamp(min=0) @ v


def relu_filled_after(q, k, v):
    p = F.relu(q @ k.mT).masked_fill(above(q @ k.mT), 0.0)
    return p @ v / 7.0


def relu_squared(q, k, v):
    s = q @ k.mT + 0.25
    keep = torch.ones(s.shape[-2:], dtype=torch.bool).tril().to(s.dtype)
    return (F.relu(s).square() * keep * 0.125) @ v


def relu_times_itself(q, k, v):
    p = F.relu((q @ k.mT).masked_fill(above(q @ k.mT), -1e9))
    return (p * p) @ v


def softcapped_first(q, k, v):
    s = torch.tanh(q @ k.mT / 5.0) * 5.0
    return torch.sigmoid(s.masked_fill(above(s), float("-inf"))) @ v


KEEP = torch.tensor([[True, True, False, True, True, False, True], [False] * 7])
CAUSAL = (sigmoid_biased, relu_causal, relu_filled_after, relu_squared, relu_times_itself)
TAKEN: list[Taken] = [
    (sigmoid_plain, heads(columns=9, groups=0), "program+sigmoid"),
    (sigmoid_of_heads, {**heads(), "bias": torch.randn(4).requires_grad_()}, "program+sigmoid"),
    (sigmoid_masked_after, {**heads(), "keep": KEEP}, "program+mask+sigmoid"),
    (sigmoid_added_mask, {**heads(), "keep": KEEP}, "program+sigmoid"),
    (relu_of_length, heads(columns=9), "program+relu"),
    (softcapped_first, heads(), "program+mask+sigmoid"),
    *(
        (f, heads(), "program+mask+" + ("sigmoid" if f is sigmoid_biased else "relu"))
        for f in CAUSAL
    ),
]


@pytest.mark.parametrize(
    ("function", "inputs", "variant", "dtype"),
    in_float32(TAKEN, sigmoid_biased, sigmoid_masked_after, relu_squared),
)
def test_taken(
    function: Callable[..., Any], inputs: dict[str, Tensor], variant: str, dtype: torch.dtype
) -> None:
    compiled = check(function, inputs, dtype)
    assert compiled.variants == [variant], compiled.misses


def programs(compiled: Compiled) -> list[ScoreProgram]:
    nodes = [n for graph in compiled.graphs for n in graph.graph.nodes if n.target is FORWARD]
    return [parsed(node.args[5]) for node in nodes]


@pytest.mark.parametrize("function", CAUSAL, ids=lambda f: f.__name__)
def test_what_weighs_nothing_is_structure(function: Callable[..., Any]) -> None:
    compiled = Compiled(function)
    compiled(**heads())
    (program,) = programs(compiled)
    assert program.keep is not None
    assert program.loads(program.keep) == ()


def mask_of_weight(q, k, v):
    s = (q @ k.mT).masked_fill(above(q @ k.mT), 0.0)
    return torch.sigmoid(s) @ v


def mask_that_grows(q, k, v):
    p = F.relu((q @ k.mT).masked_fill(above(q @ k.mT), float("-inf")))
    return torch.sigmoid(p) @ v


def mask_squared(q, k, v):
    s = (q @ k.mT).masked_fill(above(q @ k.mT), -20000.0) * 1e-3
    return F.relu(s.square() - 1.0) @ v


@pytest.mark.parametrize("function", [mask_of_weight, mask_that_grows, mask_squared])
def test_a_mask_that_leaves_weight_is_no_structure(function: Callable[..., Any]) -> None:
    compiled = check(function, heads(), torch.float32)
    assert len(compiled.variants) == 1, compiled.misses
    (program,) = programs(compiled)
    assert program.keep is None


def test_scores_of_exactly_zero_have_the_gradient_of_eager() -> None:
    inputs = heads()
    with torch.no_grad():
        inputs["q"][:, :, 2] = 0.0

    def clamped(q, k, v):
        return (q @ k.mT).clamp_min(0.0) @ v

    for function in (relu_of_length, clamped):
        compiled = Compiled(function)
        leaves = list(inputs.values())
        found = torch.autograd.grad(compiled(**inputs).square().sum(), leaves)
        wanted = torch.autograd.grad(function(**inputs).square().sum(), leaves)
        assert compiled.variants == ["program+relu"]
        for one, true in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, true)


@pytest.mark.parametrize("function", [sigmoid_plain, relu_of_length, relu_squared])
def test_lengths_change_without_recompiling(function: Callable[..., Any]) -> None:
    compiled = Compiled(function, dynamic=True)
    for batch, length in ((6, 7), (3, 11), (5, 130)):
        inputs = heads(batch=batch, rows=length, columns=length)
        torch.testing.assert_close(compiled(**inputs), function(**inputs), rtol=1e-4, atol=1e-4)
    assert len(compiled.graphs) == 1
    assert len(compiled.variants) == 1, compiled.misses


def perceptron(q, k, v):
    return F.relu(q @ k[0, 0].mT) @ v[0, 0]


def gated(q, k, v):
    return (torch.sigmoid(q @ k.mT) * (q @ v.mT)) @ v


def gate_of_the_values(q, k, v):
    return torch.sigmoid(q @ k.mT @ v) * q


def linear(q, k, v):
    return (q @ k.mT * 0.3) @ v


def wide(q, k, v):
    q, k = q.repeat(1, 1, 1, 40), k.repeat(1, 1, 1, 40)
    return torch.sigmoid(q @ k.mT) @ v


def over_queries(q, k, v):
    return torch.sigmoid(q @ k.mT).mT @ v


UNLIKE = [perceptron, gated, gate_of_the_values, linear, wide]


def dropped(q, k, v):
    return F.dropout(torch.sigmoid(q @ k.mT), 0.5) @ v


@pytest.mark.parametrize("function", [*UNLIKE, dropped], ids=lambda f: f.__name__)
def test_declined(function: Callable[..., Any]) -> None:
    compiled, inputs = Compiled(function), heads()
    torch.manual_seed(0)
    out = compiled(**inputs)
    torch.manual_seed(0)
    torch.testing.assert_close(out, function(**inputs))
    assert compiled.variants == []
    assert len(compiled.misses) == (function not in UNLIKE)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 8, 32))
        self.down = nn.Parameter(torch.randn(2, 32, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(F.relu(torch.bmm(x, self.up)), self.down)


def test_experts_are_no_attention() -> None:
    module, x = Experts(), torch.randn(2, 5, 8)
    compiled = Compiled(module)
    torch.testing.assert_close(compiled(x), module(x))
    assert compiled.findings == []
