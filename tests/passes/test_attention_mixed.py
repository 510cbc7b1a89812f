"""Probabilities that are mixed before they meet the values: differences of attentions are taken as
attentions, what mixes heads is declined, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.accuracy import assert_as_accurate_as_eager
from tests.passes.attention_cases import Compiled, Spelling

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 11, 8


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).requires_grad_()


def pairs(batch: int = BATCH, length: int = LENGTH) -> dict[str, Tensor]:
    """Two queries and two keys a head, a value of twice their width, a factor for each head."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, HEADS, length, WIDTH)
    found = {name: torch.randn(shape, generator=generator) for name in "qkrs"}
    found["v"] = torch.randn(*shape[:3], 2 * WIDTH, generator=generator)
    found["factor"] = torch.rand(HEADS, 1, 1, generator=generator) + 0.5
    return {name: x.requires_grad_() for name, x in found.items()}


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1)


def by_head(q, k, r, s, v, factor):
    return (probabilities(q, k) - factor * probabilities(r, s)) @ v


def by_number(q, k, r, s, v, factor):
    return torch.sub(probabilities(q, k), probabilities(r, s), alpha=0.5) @ v


def by_one_tensor(q, k, r, s, v, factor):
    return (probabilities(q, k) - factor[0, 0, 0].exp() * probabilities(r, s)) @ v


def three(q, k, r, s, v, factor):
    rest = -probabilities(r, s) * 0.5 + probabilities(q, s) / factor
    return (probabilities(q, k) + rest) @ v


def einsum(q, k, r, s, v, factor):
    mixed = probabilities(q, k) - factor * probabilities(r, s)
    return torch.einsum("bhij,bhjd->bihd", mixed, v)


def causal(q, k, r, s, v, factor):
    mask = torch.full((q.shape[2], k.shape[2]), float("-inf"), dtype=q.dtype).triu(1)
    one, two = (((x @ y.mT) * 0.3 + mask).softmax(-1) for x, y in ((q, k), (r, s)))
    return (one - factor * two) @ v


def one_softmax(q, k, r, s, v, factor):
    """Heads in pairs, as in the authors' code."""
    b, h, n, _ = q.shape
    q, k = (torch.stack(each, 2).flatten(1, 2) for each in ((q, r), (k, s)))
    p = (q @ k.mT * 0.3).softmax(-1, dtype=torch.float32).to(q.dtype).view(b, h, 2, n, n)
    return (p[:, :, 0] - factor * p[:, :, 1]) @ v


TAKEN = [
    (by_head, ["full"] * 2),
    (by_number, ["full"] * 2),
    (by_one_tensor, ["full"] * 2),
    (three, ["full"] * 3),
    (einsum, ["full"] * 2),
    (causal, ["causal"] * 2),
    (one_softmax, ["full"]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("function", "variants"), TAKEN)
def test_taken(function: Callable[..., Any], variants: list[str], dtype: torch.dtype) -> None:
    made: list[Compiled] = []

    def compile_(module: Spelling) -> Compiled:
        made.append(Compiled(module))
        return made[0]

    assert_as_accurate_as_eager(lambda: Spelling(function), pairs(), compile_, dtype=dtype)
    assert made[0].variants == variants, made[0].misses
    assert made[0].misses == []
    for node in made[0].graphs[0].graph.nodes:
        value = node.meta.get("val")
        masked = function is causal and isinstance(value, Tensor) and value.dim() == 2
        is_matrix = isinstance(value, Tensor) and value.shape[-2:] == (LENGTH, LENGTH)
        assert masked or not is_matrix


@pytest.mark.parametrize("function", [by_head, one_softmax])
def test_lengths_change_without_recompiling(function: Callable[..., Any]) -> None:
    compiled = Compiled(function, dynamic=True)
    for batch, length in ((6, 11), (3, 21), (5, 130)):
        inputs = pairs(batch, length)
        torch.testing.assert_close(compiled(**inputs), function(**inputs))
    assert len(compiled.graphs) == 1


def dropped(q, k, r, s, v, factor):
    return F.dropout(by_difference(q, k, r, s), 0.5) @ v


def by_difference(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return probabilities(q, k) - 0.5 * probabilities(r, s)


def by_key(q, k, r, s, v, factor):
    return (probabilities(q, k) - v[:, :, None, :, 0] * probabilities(r, s)) @ v


def and_scores(q, k, r, s, v, factor):
    return (probabilities(q, k) - r @ s.mT) @ v


def from_one(q, k, r, s, v, factor):
    return (1.0 - probabilities(q, k)) @ v


def centered(q, k, r, s, v, factor):
    p = probabilities(q, k)
    return (p - p.mean(-1, keepdim=True)) @ v


def returned(q, k, r, s, v, factor):
    p = by_difference(q, k, r, s)
    return p @ v, p


def one_returned(q, k, r, s, v, factor):
    p = probabilities(r, s)
    return (probabilities(q, k) - 0.5 * p) @ v, p


def mixed_after(q, k, r, s, v, factor):
    return torch.einsum("bhij,hk->bkij", probabilities(q, k), r[0, :, :HEADS, 0]) @ v


def mixed_before(q, k, r, s, v, factor):
    return torch.einsum("bhij,hk->bkij", q @ k.mT, r[0, :, :HEADS, 0]).softmax(-1) @ v


BETWEEN = "between the softmax and the second contraction"


@pytest.mark.parametrize(
    ("function", "variants"),
    [(returned, ["full+weights", "full+weights"]), (one_returned, ["full", "full+weights"])],
)
def test_returned_too(function: Callable[..., Any], variants: list[str]) -> None:
    compiled, inputs = Compiled(function), pairs()
    leaves = [inputs[name] for name in "qkrsv"]
    found, expected = compiled(**inputs), function(**inputs)
    torch.testing.assert_close(found, expected)
    assert sorted(compiled.variants) == variants
    ours, theirs = (
        torch.autograd.grad([x.square().sum() for x in each], leaves) for each in (found, expected)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (dropped, f"aten.sub.Tensor {BETWEEN}"),
        (by_key, "what differs from key to key"),
        (and_scores, "is no softmax of scores"),
        (from_one, f"aten.rsub.Scalar {BETWEEN}"),
        (centered, "the probabilities are broadcast"),
        (mixed_after, "not summed over the softmax's dim"),
        (mixed_before, "heads of the scores are mixed"),
    ],
)
def test_declined(function: Callable[..., Any], reason: str) -> None:
    compiled, inputs = Compiled(function), pairs()
    torch.manual_seed(0)
    out = compiled(**inputs)
    torch.manual_seed(0)
    torch.testing.assert_close(out, function(**inputs))
    assert compiled.variants == []
    assert len(compiled.misses) == 1
    assert reason in compiled.misses[0]


class Talking(nn.Module):
    """Heads mixed by layers before and after the softmax (Shazeer et al., arXiv 2003.02436)."""

    def __init__(self, before: nn.Module | None, after: nn.Module | None) -> None:
        super().__init__()
        self.before, self.after = before, after

    def mix(self, layer: nn.Module | None, x: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
        return x if layer is None else layer(x)  # type: ignore[no-any-return]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = self.mix(self.before, q @ k.mT).softmax(-1)
        return self.mix(self.after, x) @ v


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(HEADS, HEADS), lambda: nn.Conv2d(HEADS, HEADS, 1)]
)
@pytest.mark.parametrize("places", [(True, False), (False, True), (True, True)])
def test_talking_heads_are_named(make: Callable[[], nn.Module], places: tuple[bool, bool]) -> None:
    module = Talking(*(make() if there else None for there in places))
    inputs = [draw(BATCH, HEADS, LENGTH, WIDTH) for _ in range(3)]
    compiled = Compiled(module)
    torch.testing.assert_close(compiled(*inputs), module(*inputs))
    assert compiled.variants == []
    (miss,) = compiled.misses
    assert (BETWEEN if places[1] else "on the scores, at test_attention_mixed.py") in miss
