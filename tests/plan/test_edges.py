"""Small programs that were planned wrong once; most were found by tests/fuzz and tests/opinfo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.backend import Compiler

Case = tuple[Callable[..., Any], tuple[Tensor, ...]]


_DRAWN = torch.Generator().manual_seed(0)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=_DRAWN).to(dtype).requires_grad_()


CASES: dict[str, Case] = {
    "a diagonal is reduced, the whole is stored": (
        lambda x: (F.celu(x), F.celu(x).diagonal().mean([0, 1], keepdim=True)), (leaf(1, 2, 1),)),
    "an element is deviated": (
        lambda x: x.abs().add(0.1).log().select(1, 0).std(0, correction=0), (leaf(1, 2),)),
    "index_select of a scalar": (
        lambda x, i: x.index_select(0, i) * 2, (leaf(), torch.tensor([0]))),
    "gather of a scalar": (lambda x, i: x.gather(0, i) * 2, (leaf(), torch.tensor([0]))),
    "a flipped axis is split": (lambda x: x.flatten().flip(0).view(2, 3, 2) * 2, (leaf(2, 6),)),
    "every product but one": (lambda x: x.prod(), (leaf(2, 3, 2),)),
    "an element beside the first of a batch": (
        lambda a, b: (a[:, 0] + a[:, 1], b[:, 0] + b[:, 1]), (leaf(1, 2), leaf(1, 2))),
    "ties down a column, then along the row": (
        lambda x: x[..., None].expand(1, 2).amin(0), (leaf(1),)),
    "copied into a temporary": (lambda x: (x.exp() - x).copy_(x.sin()), (leaf(3),)),
    "a norm in both halves of a stack": (
        lambda x: torch.stack([torch.linalg.vector_norm(x, dim=0), x.sum()]), (leaf(2),)),
    "a sum beside its rows": (lambda x: torch.cat([x.sum(1, keepdim=True), x], 1), (leaf(3, 4),)),
    "a running sum beside its row": (lambda x: torch.cat([x, x.cumsum(1)], 1), (leaf(3, 4),)),
    "a bound below zero, of a uint8": (
        lambda x: x.clamp(-1, 1), (torch.tensor([0, 1, 5], dtype=torch.uint8),)),
    "copied onto itself": (lambda x: x.copy_(x), (torch.tensor(2.0),)),
    "take by a scalar": (lambda x, i: x.take(i) * 2, (leaf(3, 2), torch.tensor(4))),
    "the least of short floats": (
        lambda x: (x * x).amin(0), (leaf(7, 3, dtype=torch.bfloat16),)),
    "the greatest of short floats": (
        lambda x: (x.abs().add(0.5) ** -0.5).amax(1), (leaf(3, 7, dtype=torch.float16),)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_is_what_eager_gives(name: str) -> None:
    function, inputs = CASES[name]
    ours, theirs = (
        [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs] for _ in range(2)
    )
    results = _listed(
        torch.compile(function, backend=Compiler(engine="reference", strict=True))(*ours)
    )
    expected = _listed(function(*theirs))
    torch.testing.assert_close(results, expected)
    for outputs in (results, expected):
        wanted = [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]
        if wanted:
            torch.autograd.backward(wanted, [_cotangent(y) for y in wanted])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
        _close(one.grad, other.grad)


def _close(one: Tensor | None, other: Tensor | None) -> None:
    """A short float may be off by a rounding: it was held in float32 in between."""
    short = other is not None and other.dtype in (torch.float16, torch.bfloat16)
    rounding = {"rtol": 2 * torch.finfo(other.dtype).eps, "atol": 0.0} if short else {}  # type: ignore[union-attr]
    torch.testing.assert_close(one, other, **rounding)


def _listed(output: Any) -> list[Any]:
    return list(output) if isinstance(output, tuple) else [output]


def _cotangent(y: Tensor) -> Tensor:
    return torch.arange(1.0, 1.0 + y.numel()).reshape(y.shape).to(y.dtype)
