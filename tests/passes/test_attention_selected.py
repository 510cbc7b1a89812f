"""Masks written as arithmetic, scores * keep - 1e4 * (1 - keep): taken for masks where they are
ones, and as they are written elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iocompiler.passes.attention.running import choice
from tests.accuracy import assert_as_accurate_as_eager
from tests.passes.attention_cases import Compiled, Spelling, heads
from tests.passes.test_attention_held import Holding
from tests.passes.test_attention_programs import programs


def triangle(length: int = 20) -> Tensor:
    return torch.ones(length, length).tril()


def scores(q, k):
    return q @ k.mT * 0.3


def corner(mask, q, k):
    return mask[: q.shape[-2], : k.shape[-2]]


def gpt(mask, q, k, v):
    b = corner(mask, q, k)
    return (scores(q, k) * b + -1e4 * (1 - b)).softmax(-1) @ v


def scaled_after(mask, q, k, v):
    b = corner(mask, q, k)
    return (b * (q @ k.mT) * 0.3 - (1 - b) * 1e10).softmax(-1) @ v


def added_first(mask, q, k, v):
    b = corner(mask, q, k)
    return ((b - 1) * 1e9 + scores(q, k) * b).softmax(-1) @ v


def by_condition(mask, q, k, v):
    b = corner(mask, q, k) > 0
    return (scores(q, k) * b - 1e4 * (~b).to(q.dtype)).softmax(-1) @ v


def hidden(mask, q, k, v):
    b = corner(mask, q, k) == 0
    hides = b.to(q.dtype)
    return (scores(q, k) * (1 - hides) + hides * -1e9).softmax(-1) @ v


def computed(mask, q, k, v):
    b = torch.tril(torch.ones(q.shape[-2], k.shape[-2], dtype=q.dtype))
    return (scores(q, k) * b - 1e9 * (1 - b)).softmax(-1) @ v


CAUSAL = [gpt, scaled_after, added_first, by_condition, hidden, computed]


def compiled_as_accurately(make: Callable[[], nn.Module], inputs: Any, dtype: Any) -> Compiled:
    made: list[Compiled] = []

    def compile_(module: nn.Module) -> Compiled:
        made.append(Compiled(module))
        return made[0]

    assert_as_accurate_as_eager(make, inputs, compile_, dtype=dtype)
    return made[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("function", CAUSAL)
def test_causal(function: Callable[..., Any], dtype: torch.dtype) -> None:
    found = compiled_as_accurately(lambda: Holding(function, triangle()), heads(), dtype)
    assert found.variants == ["causal"], found.misses


@pytest.mark.parametrize("function", CAUSAL)
def test_a_program_has_it_as_structure(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "wanted", lambda call, found: True)
    make = lambda: Holding(function, triangle())
    (program,) = programs(compiled_as_accurately(make, heads(), torch.float32))
    assert program.keep is not None
    assert program.loads(program.score, program.keep) == ()


def test_lengths_change_without_recompiling() -> None:
    module = Holding(gpt, triangle(40))
    compiled = Compiled(module, dynamic=True)
    for rows in (7, 11, 33):
        inputs = heads(rows=rows, columns=rows)
        torch.testing.assert_close(compiled(**inputs), module(**inputs))
    assert compiled.variants == ["causal"]


def padded(q, k, v, ids):
    keep = (ids != 0)[:, None, None].to(q.dtype)
    return (scores(q, k) * keep - 1e9 * (1 - keep)).softmax(-1) @ v


@pytest.mark.parametrize("told", [True, False], ids=["program", "library"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_padding(dtype: torch.dtype, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of all keys: then a row is the mean of the values, as in eager."""
    if told:
        monkeypatch.setattr(choice, "wanted", lambda call, found: True)
    ids = torch.tensor([[3, 1, 2, 4, 0, 0, 0], [0] * 7])
    inputs = {**heads(), "ids": ids}
    found = compiled_as_accurately(lambda: Spelling(padded), inputs, dtype)
    assert found.variants == ["program+mask" if told else "mask"], found.misses


def mild(mask, q, k, v):
    b = corner(mask, q, k)
    return (scores(q, k) * b - 10.0 * (1 - b)).softmax(-1) @ v


def another(mask, q, k, v):
    b, c = corner(mask, q, k), corner(mask.flip(0), q, k)
    return (scores(q, k) * b - 1e4 * (1 - c)).softmax(-1) @ v


def opposite(mask, q, k, v):
    b = corner(mask, q, k)
    return (scores(q, k) * b - 1e4 * b).softmax(-1) @ v


def not_zero(mask, q, k, v):
    b = corner(mask, q, k)
    return (scores(q, k) * (0.5 + 0.5 * b) - 1e4 * (1 - b)).softmax(-1) @ v


def capped_between(mask, q, k, v):
    b = corner(mask, q, k)
    return (torch.cos(scores(q, k) * b).tanh() - 1e4 * (1 - b)).softmax(-1) @ v


def added_to_all(mask, q, k, v):
    b = corner(mask, q, k)
    return (scores(q, k) * b + (2.0 - 1e4 * (1 - b)) * 3).softmax(-1) @ v


def rewards(mask, q, k, v):
    b = corner(mask, q, k)
    return (scores(q, k) * b + 1e4 * (1 - b)).softmax(-1) @ v


@pytest.mark.parametrize(
    "function", [mild, another, opposite, not_zero, capped_between, added_to_all, rewards]
)
def test_what_is_no_such_mask_is_computed_as_written(function: Callable[..., Any]) -> None:
    make = lambda: Holding(function, triangle())
    found = compiled_as_accurately(make, heads(), torch.float32)
    assert not any(each in ("causal", "mask") for each in found.variants)


def test_an_argument_of_ones_and_zeros_is_no_mask() -> None:
    """It may hold any number at the next call."""

    def function(q, k, v, b):
        return (scores(q, k) * b - 1e4 * (1 - b)).softmax(-1) @ v

    compiled = Compiled(function)
    for b in (triangle(7), torch.rand(7, 7)):
        inputs = {**{name: x.detach() for name, x in heads().items()}, "b": b}
        torch.testing.assert_close(compiled(**inputs), function(**inputs))
    assert compiled.variants == []
    assert "multiplied" in compiled.misses[0]
