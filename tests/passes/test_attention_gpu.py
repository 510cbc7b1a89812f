"""Rewritten graphs on a GPU, in bfloat16: taken, by a library kernel, and as accurate as eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.accuracy import assert_as_accurate_as_eager
from tests.passes.attention_cases import Compiled, Spelling, heads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.125).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * 0.125
    hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
    return s.masked_fill(hidden, float("-inf")).softmax(-1) @ v


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = torch.stack([q, k, v], 2).permute(0, 3, 2, 1, 4)
    q, k, v = (each.transpose(1, 2) for each in x.unbind(2))
    return causal(q, k, v).transpose(1, 2).flatten(2)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, *(x.repeat_interleave(2, 1) for x in (k[:, :2], v[:, :2])))


def bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return (q @ k.mT * 0.125 + table).softmax(-1) @ v


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * 0.125
    place = torch.arange(s.shape[-1], device=s.device)
    apart = place[:, None] - place[None, :]
    return s.masked_fill((apart < 0) | (apart > 40), float("-inf")).softmax(-1) @ v


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT * 0.005) * 25.0).softmax(-1) @ v


@pytest.mark.parametrize("length", [128, 150])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("function", [bias, window, softcap])
def test_a_program_on_a_gpu(function: Callable[..., Any], length: int, dtype: torch.dtype) -> None:
    given = heads(rows=length, columns=length, width=64)
    if function is bias:
        given["table"] = torch.randn(1, 4, length, length).requires_grad_()
    made: list[Compiled] = []

    def compile_(module: Spelling) -> Compiled:
        made.append(Compiled(module))
        return made[0]

    assert_as_accurate_as_eager(
        lambda: Spelling(function), given, compile_, dtype=dtype, device="cuda"
    )
    assert made[0].variants[0].startswith("program")
    assert made[0].calls == []


@pytest.mark.parametrize("length", [128, 150])
@pytest.mark.parametrize(
    ("function", "kernels"),
    [
        (full, ("cudnn", "flash")),
        (causal, ("cudnn", "flash")),
        (packed, ("cudnn", "flash")),
        (grouped, ("cudnn", "flash")),
    ],
)
def test_on_a_gpu(function: Callable[..., Any], kernels: tuple[str, ...], length: int) -> None:
    given = heads(rows=length, columns=length, width=64)
    made: list[Compiled] = []

    def compile_(module: Spelling) -> Compiled:
        made.append(Compiled(module))
        return made[0]

    assert_as_accurate_as_eager(
        lambda: Spelling(function), given, compile_, dtype=torch.bfloat16, device="cuda"
    )
    assert [call.args[7] in kernels for call in made[0].calls] == [True]
