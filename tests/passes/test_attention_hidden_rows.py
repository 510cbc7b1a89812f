"""Rows that finite masks hide altogether: uniform in eager, and differentiated as that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.ops.attention import attention
from tests.accuracy import assert_as_accurate_as_eager, assert_near_exact
from tests.passes.attention_cases import Compiled, Spelling, heads

LOWEST = torch.finfo(torch.float32).min
LENGTH = 7


def padding(*, rows: bool) -> Tensor:
    """What counts: the first keys of one sequence do not, nor (``rows``) their queries."""
    keys = torch.ones(2, LENGTH, dtype=torch.bool)
    keys[0, :3] = False
    return (keys[:, None, :, None] & keys[:, None, None]) if rows else keys[:, None, None]


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def filled(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~keep, LOWEST).softmax(-1) @ v


def filled_little(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~keep, -1e4).softmax(-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, q @ k.mT / 3.0, -1e9).softmax(-1) @ v


def filled_after_a_bias(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + bias).masked_fill(~keep, LOWEST).softmax(-1) @ v


def filled_twice(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(causal(), -1e9).masked_fill(~keep, -1e9)
    return scores.softmax(-1) @ v


def filled_in_groups(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    return filled(q, k, v, keep)


def added(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT + (1.0 - keep.to(q.dtype)) * LOWEST).softmax(-1) @ v


def added_as_given(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + mask).softmax(-1) @ v


def added_twice(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    later = torch.where(causal(), LOWEST, 0.0)
    return (q @ k.mT + later + torch.where(keep, 0.0, -1e9)).softmax(-1) @ v


def inputs(function: Callable[..., Any]) -> dict[str, Tensor]:
    found = dict(heads())
    if function is added_as_given:
        return found | {"mask": torch.where(padding(rows=True), 0.0, LOWEST)}
    if function is filled_after_a_bias:
        found["bias"] = torch.randn(4, LENGTH, LENGTH).requires_grad_()
    return found | {"keep": padding(rows=function not in (filled_twice, added_twice))}


@pytest.mark.parametrize("engine", ["aten", "auto"])
@pytest.mark.parametrize(
    "function",
    [
        filled,
        filled_little,
        chosen,
        filled_after_a_bias,
        filled_twice,
        filled_in_groups,
        added,
        added_as_given,
        added_twice,
    ],
)
def test_gradients(function: Callable[..., Any], engine: str) -> None:
    """A number written over scores stops their gradients, one that is added does not."""
    assert_as_accurate_as_eager(
        lambda: Spelling(function),
        inputs(function),
        lambda m: torch.compile(m, backend="iocompiler", options={"engine": engine}),
        dtype=torch.float32,
    )
    compiled = Compiled(function)
    compiled(**inputs(function))
    assert len(compiled.calls) == 1


@pytest.mark.parametrize("engine", ["aten", "reference"])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize(
    ("later", "unseen"), [(LOWEST, LOWEST), (-1e9, LOWEST), (-1e9, -1e9), (LOWEST, -1e9)]
)
def test_what_is_added_to_what_is_written(
    later: float, unseen: float, capped: bool, engine: str
) -> None:
    """A row of padding is the mean of the values that exactly one of the two numbers hides, or the
    one that hides less.
    """

    def written_and_added(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = 5.0 * torch.tanh(q @ k.mT / 5.0) if capped else q @ k.mT
        scores = scores.masked_fill(causal(), later) + (1.0 - keep.to(q.dtype)) * unseen
        return scores.softmax(-1) @ v

    given = heads() | {"keep": padding(rows=False)}
    assert_as_accurate_as_eager(
        lambda: Spelling(written_and_added),
        given,
        lambda m: torch.compile(m, backend="iocompiler", options={"engine": engine}),
        dtype=torch.float32,
    )
    compiled = Compiled(written_and_added)
    compiled(**given)
    assert len(compiled.variants) == 1


def two_numbers(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.mT + torch.where(keep, 0.0, LOWEST)).masked_fill(causal(), -1e9)
    return scores.softmax(-1) @ v


def bias_behind(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~keep, LOWEST) + q.mean(-1, keepdim=True) * k.mean(-1)[
        :, :, None
    ]
    return scores.softmax(-1) @ v


def dropped(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).masked_fill(~keep, LOWEST).softmax(-1), 0.5) @ v


@pytest.mark.parametrize("function", [two_numbers, bias_behind, dropped])
def test_rows_that_are_no_means_run_by_no_library(function: Callable[..., Any]) -> None:
    compiled = Compiled(function)
    compiled(**heads(), keep=padding(rows=function is not two_numbers))
    assert compiled.calls == []


@pytest.mark.parametrize("kernel", ["cpu", "blockwise"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_kernels(kernel: str, is_causal: bool) -> None:
    """With the same number beside all scores of a row the probabilities are of equal size."""
    bias = torch.zeros(1, 1, LENGTH, LENGTH).index_fill(2, torch.tensor([0, 4]), -1e30)
    given = [x.detach() for x in heads().values()]
    grad = torch.randn(2, 4, LENGTH, 8)

    def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        q, k, v = leaves = [x.to(dtype).requires_grad_() for x in given]
        if ours:
            out = attention(q, k, v, bias, causal=is_causal, scale=1.0, kernel=kernel)
        else:
            scores = q @ k.mT + bias.to(dtype)
            scores = scores.masked_fill(causal(), -torch.inf) if is_causal else scores
            out = scores.softmax(-1) @ v
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    found, eager, exact = (
        run(torch.float32, True),
        run(torch.float32, False),
        run(torch.float64, False),
    )
    assert_near_exact(found, eager, exact, torch.float32)
