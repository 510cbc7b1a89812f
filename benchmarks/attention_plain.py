"""Attention as users write it, a function a kind: of q, k, v [B, H, S, D] and inputs of its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

NEGATIVE = float("-inf")
Inputs = dict[str, Tensor]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


def _above(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)


def _finished(s: Tensor, v: Tensor) -> Tensor:
    return s.softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _scores(q, k)
    return _finished(s.masked_fill(_above(s), NEGATIVE), v)


def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _finished(_scores(q, k), v)


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As models hand over a mask that is causal, and do not say so."""
    at = torch.arange(q.shape[2], device=q.device)
    seen = (at[None, :] <= at[:, None])[None, None].expand(q.shape[0], 1, -1, -1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def by_library(causal: bool) -> Callable[..., Tensor]:
    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attended


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    s = _scores(q, k)
    place = torch.arange(s.shape[-1], device=s.device)
    s = s + slopes[:, None, None] * (place[None, :] - place[:, None])
    return _finished(s.masked_fill(_above(s), NEGATIVE), v)


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = 20.0 * torch.tanh(_scores(q, k) / 20.0)
    return _finished(s.masked_fill(_above(s), NEGATIVE), v)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _scores(q, k)
    place = torch.arange(s.shape[-1], device=s.device)
    far = place[:, None] - place[None, :] >= 512
    return _finished(s.masked_fill(_above(s) | far, NEGATIVE), v)


def sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    s = _scores(q, k)
    s = s.masked_fill(_above(s), NEGATIVE)
    beside = sink[None, :, None, None].expand(*s.shape[:-1], 1)
    return torch.cat([s, beside], -1).softmax(-1)[..., :-1] @ v


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _scores(q, k) - math.log(q.shape[2])
    return torch.sigmoid(s.masked_fill(_above(s), NEGATIVE)) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def cached(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    """A cache of static length, filled up to ``position``, that of each query."""
    seen = torch.arange(k.shape[2], device=k.device) <= position[:, None]
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, enable_gqa=True
    )


def buckets(distance: Tensor) -> Tensor:
    """T5's bucket of a distance key - query, looking back only (Raffel et al., arXiv 1910.10683,
    section 2.1): 32 buckets, exact below 16, then logarithmic up to 128.
    """
    n = (-distance).clamp_min(0)
    large = 16 + (torch.log(n.float().clamp_min(1) / 16) / math.log(128 / 16) * 16).long()
    return torch.where(n < 16, n, large.clamp_max(31))


def relative(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    s = _scores(q, k)
    place = torch.arange(s.shape[-1], device=s.device)
    found = torch.nn.functional.embedding(buckets(place[None, :] - place[:, None]), table)
    s = s + found.permute(2, 0, 1).unsqueeze(0)
    return _finished(s.masked_fill(_above(s), NEGATIVE), v)


def document(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s = _scores(q, k)
    other = ids[:, None, :, None] != ids[:, None, None, :]
    return _finished(s.masked_fill(other | _above(s), NEGATIVE), v)


def block_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return _finished(_scores(q, k).masked_fill(~mask, NEGATIVE), v)
