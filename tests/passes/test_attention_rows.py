"""Attention with a sink, or whose log-sum-exp is read too: spellings, and what looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.accuracy import assert_as_accurate_as_eager
from tests.passes.attention_cases import Compiled, Spelling, Taken, heads, in_float32

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


def beside(q: Tensor, s: Tensor, sink: Tensor) -> Tensor:
    return torch.cat([s, sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)], -1)


def above(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)


def sink_of_gpt_oss(q, k, v, sink, mask):
    s = torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask
    both = beside(q, s, sink)
    both = both - both.max(dim=-1, keepdim=True).values
    p = F.softmax(both, dim=-1, dtype=both.dtype)
    return torch.matmul(F.dropout(p[..., :-1], p=0.1, training=False), v).transpose(1, 2)


def sink_first(q, k, v, sink):
    s = (q @ k.mT).masked_fill(above(q @ k.mT), float("-inf"))
    s = torch.cat([sink.view(-1, 1, 1).expand(q.shape[0], 4, s.shape[-2], 1), s], -1)
    return s.softmax(-1, dtype=torch.float32).to(q.dtype)[..., 1:] @ v


def sink_split_off(q, k, v, sink):
    both = beside(q, (q @ k.mT).tanh() * 5.0, sink)
    return both.softmax(-1).split([k.shape[-2], 1], -1)[0] @ v


def sink_in_the_sum(q, k, v, sink):
    s, sink = q @ k.mT, sink.view(-1, 1, 1)
    top = torch.maximum(s.amax(-1, keepdim=True), sink)
    e = torch.exp(s - top)
    return (e / (torch.exp(sink - top) + e.sum(-1, keepdim=True))) @ v


def sink_in_the_sum_late(q, k, v, sink):
    s, sink = q @ k.mT, sink.view(-1, 1, 1)
    top = s.amax(-1, keepdim=True)
    e = torch.exp(s - top)
    return (e @ v) / (e.sum(-1, keepdim=True) + torch.exp(sink - top))


def sink_in_the_log(q, k, v, sink):
    s = q @ k.mT
    total = torch.logaddexp(torch.logsumexp(s, -1, keepdim=True), sink.view(1, -1, 1, 1))
    return torch.exp(s - total) @ v


def sink_in_the_log_joined(q, k, v, sink):
    s = q @ k.mT
    return torch.exp(s - torch.logsumexp(beside(q, s, sink), -1, keepdim=True)) @ v


def sink_of_the_output(q, k, v, sink):
    s = q @ k.mT
    lse = torch.logsumexp(s, -1)
    return (s.softmax(-1) @ v) * torch.sigmoid(lse - sink.view(-1, 1)).unsqueeze(-1)


def sink_that_is_a_key(q, k, v, sink):
    null = (q * sink.view(-1, 1, 1)).sum(-1, keepdim=True)
    return torch.cat([q @ k.mT, null], -1).softmax(-1)[..., :-1] @ v


def plus_one(q, k, v):
    e = torch.exp(q @ k.mT)
    return (e / (1.0 + e.sum(-1, keepdim=True))) @ v


def plus_one_floored(q, k, v):
    s = (q @ k.mT).masked_fill(above(q @ k.mT), float("-inf"))
    top = s.amax(-1, keepdim=True).clamp(min=0)
    e = torch.exp(s - top)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(-top))) @ v


def plus_one_late(q, k, v):
    s = q @ k.mT
    top = s.max(-1, keepdim=True).values.detach()
    e = torch.exp(s - top)
    return (e @ v) / (e.sum(-1, keepdim=True) + torch.exp(-top))


def epsilon_in_the_sum(q, k, v):
    e = torch.exp(q @ k.mT)
    return (e / (e.sum(-1, keepdim=True) + 1e-3)) @ v


def zero_padded(q, k, v):
    return F.pad(q @ k.mT, (1, 0)).softmax(-1)[..., 1:] @ v


def zero_joined(q, k, v):
    s = q @ k.mT
    zero = torch.zeros(*s.shape[:-1], 1, dtype=s.dtype)
    return torch.cat([s, zero], -1).softmax(-1)[..., :-1] @ v


def with_lse(q, k, v):
    s = (q @ k.mT).masked_fill(above(q @ k.mT), float("-inf"))
    return s.softmax(-1) @ v, s.logsumexp(-1)


def with_lse_by_hand(q, k, v):
    s = q @ k.mT * 0.3
    top = s.amax(-1, keepdim=True)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    return (e / total) @ v, (top + total.log()).squeeze(-1)


def with_lse_of_float(q, k, v):
    s = q @ k.mT
    p = s.softmax(-1, dtype=torch.float32).to(v.dtype)
    return p @ v, torch.logsumexp(s.float(), dim=-1, keepdim=True)


def with_squared_lse_before_the_output(q, k, v):
    s = q @ k.mT
    loss = s.logsumexp(-1).pow(2).mean((1, 2))
    return s.softmax(-1) @ v + loss.view(-1, 1, 1, 1)


def with_lse_and_sink(q, k, v, sink):
    s = q @ k.mT
    lse = torch.logsumexp(s, -1, keepdim=True)
    total = torch.logaddexp(lse, sink.view(1, -1, 1, 1))
    return torch.exp(s - total) @ v, total


def merged(q, k, v):
    """Two parts of the keys, each with its own softmax, put together by their sums."""
    parts = []
    sizes = [3, k.shape[2] - 3]
    for k_part, v_part in zip(k.split(sizes, 2), v.split(sizes, 2), strict=True):
        s = q @ k_part.mT
        parts.append((s.softmax(-1) @ v_part, s.logsumexp(-1, keepdim=True)))
    (one, a), (two, b) = parts
    top = torch.maximum(a, b)
    return (one * (a - top).exp() + two * (b - top).exp()) / ((a - top).exp() + (b - top).exp())


def _sink(**more: Tensor) -> dict[str, Tensor]:
    return {**heads(), "sink": SINKS.clone().requires_grad_(), **more}


def additive(rows: int, hidden: float) -> Tensor:
    """Causal, and of the first batch the last keys are hidden."""
    mask = torch.zeros(2, 1, rows, rows).masked_fill(above(torch.zeros(rows, rows)), hidden)
    mask[0, :, :, rows - 2 :] = hidden
    return mask


TAKEN: list[Taken] = [
    (sink_of_gpt_oss, _sink(mask=additive(7, torch.finfo(torch.float32).min / 2)), "sink"),
    *(
        (f, _sink(), "sink")
        for f in (
            sink_first, sink_split_off, sink_in_the_sum, sink_in_the_sum_late, sink_in_the_log,
            sink_in_the_log_joined, sink_that_is_a_key,
        )
    ),
    *(
        (f, heads(columns=9), "sink")
        for f in (
            plus_one, plus_one_floored, plus_one_late, epsilon_in_the_sum, zero_padded, zero_joined,
        )
    ),
    (sink_of_the_output, _sink(), "lse"),
    *(
        (f, heads(), "lse")
        for f in (
            with_lse, with_lse_by_hand, with_lse_of_float, with_squared_lse_before_the_output,
        )
    ),
    (with_lse_and_sink, _sink(), "sink+lse"),
]  # fmt: skip


def check(function: Callable[..., Any], inputs: dict[str, Tensor], dtype: torch.dtype) -> Compiled:
    made: list[Compiled] = []

    def compile_(module: Spelling) -> Compiled:
        made.append(Compiled(module))
        return made[0]

    assert_as_accurate_as_eager(lambda: Spelling(function), inputs, compile_, dtype=dtype)
    return made[0]


@pytest.mark.parametrize(
    ("function", "inputs", "variant", "dtype"),
    in_float32(TAKEN, sink_of_gpt_oss, sink_in_the_log, plus_one_late, with_lse_and_sink),
)
def test_taken(
    function: Callable[..., Any], inputs: dict[str, Tensor], variant: str, dtype: torch.dtype
) -> None:
    compiled = check(function, inputs, dtype)
    assert len(compiled.variants) == 1, compiled.misses
    assert compiled.variants[0].endswith("+" + variant)


def sink_kept(q, k, v, sink):
    extended = torch.cat([v, v[:, :, :1]], 2)
    return beside(q, q @ k.mT, sink).softmax(-1) @ extended


def other_column_dropped(q, k, v, sink):
    return beside(q, q @ k.mT, sink).softmax(-1)[..., 1:] @ v


def two_blocks_of_scores(q, k, v, sink):
    s = torch.cat([q @ k.mT, q @ k.flip(2).mT], -1)
    return s.softmax(-1)[..., : k.shape[2]] @ v


def two_added(q, k, v, sink):
    e = torch.exp(q @ k.mT)
    return (e / (e.sum(-1, keepdim=True) + sink.view(-1, 1, 1))) @ v


def another_shift(q, k, v, sink):
    s, sink = q @ k.mT, sink.view(-1, 1, 1)
    top = s.amax(-1, keepdim=True)
    e = torch.exp(s - top)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(sink))) @ v


def one_for_each_key(q, k, v, sink):
    s = q @ k.mT
    e = torch.exp(s)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(k.sum(-1).unsqueeze(-2)))) @ v


def lse_over_queries(q, k, v, sink):
    s = q @ k.mT
    return s.softmax(-1) @ v, s.logsumexp(-2)


def lse_of_other_scores(q, k, v, sink):
    s = q @ k.mT
    return s.softmax(-1) @ v, (s * 2.0).logsumexp(-1)


def lse_without_its_maximum(q, k, v, sink):
    s = q @ k.mT
    e = torch.exp(s - s.amax(-1, keepdim=True))
    total = e.sum(-1, keepdim=True)
    return (e / total) @ v, total.log()


def values_of_the_lse(q, k, v, sink):
    s = q @ k.mT
    return s.softmax(-1) @ (v * s.logsumexp(-1).unsqueeze(-1))


@pytest.mark.parametrize(
    "function",
    [
        sink_kept, other_column_dropped, two_blocks_of_scores, two_added, another_shift,
        one_for_each_key, lse_over_queries, lse_of_other_scores, lse_without_its_maximum,
        values_of_the_lse,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_declined(function: Callable[..., Any]) -> None:
    compiled, inputs = Compiled(function), _sink()
    torch.testing.assert_close(compiled(**inputs), function(**inputs))
    assert compiled.variants == []
    assert len(compiled.misses) == (function not in (two_added, another_shift))


@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("function", [sink_of_gpt_oss, sink_in_the_log_joined])
def test_rows_without_a_key_are_the_sinks(function: Callable[..., Any], hidden: float) -> None:
    mask = additive(7, hidden)
    mask[:, :, 3] = hidden

    def masked(q, k, v, sink, mask):
        if function is sink_of_gpt_oss:
            return function(q, k, v, sink, mask)
        s = q @ k.mT + mask
        return torch.exp(s - torch.logsumexp(beside(q, s, sink), -1, keepdim=True)) @ v

    inputs = _sink(mask=mask)
    compiled = check(masked, inputs, torch.float32)
    assert compiled.variants[0].endswith("+sink"), compiled.misses
    out = compiled(**inputs)
    assert not out.isnan().any()


def test_rows_without_a_key_stay_nan_where_nothing_guards_them() -> None:
    def function(q, k, v, sink, mask):
        s, sink = q @ k.mT + mask, sink.view(-1, 1, 1)
        top = s.amax(-1, keepdim=True)
        e = torch.exp(s - top)
        return (e / (e.sum(-1, keepdim=True) + torch.exp(sink - top))) @ v

    mask = additive(7, float("-inf"))
    mask[:, :, 3] = float("-inf")
    inputs = {name: x.detach() for name, x in _sink(mask=mask).items()}
    compiled = Compiled(function)
    expected = function(**inputs)
    assert expected.isnan().any()
    torch.testing.assert_close(compiled(**inputs), expected, equal_nan=True)
    assert compiled.variants[0].endswith("+sink")


def test_the_lse_of_rows_without_a_key() -> None:
    """-inf as in eager; no gradient flows through it, where eager's is NaN."""

    def function(q, k, v, mask):
        s = q @ k.mT + mask
        return s.softmax(-1) @ v, s.logsumexp(-1)

    mask, others = additive(7, float("-inf")), [0, 1, 2, 4, 5, 6]
    mask[:, :, 3] = float("-inf")
    inputs = {**heads(), "mask": mask}
    compiled = Compiled(function)
    out, lse = compiled(**inputs)
    expected = function(**inputs)
    torch.testing.assert_close(out, expected[0], equal_nan=True)
    torch.testing.assert_close(lse, expected[1])
    assert compiled.variants == ["program+score+lse"]
    q, k, v = (inputs[name] for name in "qkv")
    found = torch.autograd.grad(lse.exp().sum(), [q, k])
    _, alone = function(q[:, :, others], k, v, mask[:, :, others])
    for one, true in zip(found, torch.autograd.grad(alone.exp().sum(), [q, k]), strict=True):
        torch.testing.assert_close(one, true)


@pytest.mark.parametrize("function", [sink_first, sink_of_the_output, with_lse])
def test_lengths_change_without_recompiling(function: Callable[..., Any]) -> None:
    compiled = Compiled(function, dynamic=True)
    for batch, length in ((6, 7), (3, 11), (5, 130)):
        inputs = heads(batch=batch, rows=length, columns=length)
        if function is not with_lse:
            inputs["sink"] = SINKS
        torch.testing.assert_close(compiled(**inputs), function(**inputs))
    assert len(compiled.graphs) == 1
    assert len(compiled.variants) == 1, compiled.misses


def test_each_of_two_parts_is_an_attention() -> None:
    compiled = check(merged, heads(columns=9), torch.float32)
    assert compiled.variants == ["program+lse"] * 2


def test_a_sink_keeps_structure() -> None:
    """A causal mask of finite numbers, as a padded batch has it, is proved not to hide a row's
    sink; no tensor is added to the scores.
    """

    def function(q, k, v, sink, padding):
        s = q @ k.mT
        keep = ~above(s) & padding[:, None, None, :]
        s = s.masked_fill(~keep, torch.finfo(s.dtype).min)
        return beside(q, s, sink).softmax(-1)[..., :-1] @ v

    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[0, :3] = False
    compiled = check(function, _sink(padding=padding), torch.float32)
    assert compiled.variants == ["program+mask+sink"]
