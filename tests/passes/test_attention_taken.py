"""Spellings of attention that must be taken: recognised with the right structure, and as accurate
as eager.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.accuracy import assert_as_accurate_as_eager
from tests.passes.attention_cases import Compiled, Spelling, heads

Case = tuple[Callable[..., Any], str, dict[str, Tensor]]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def above(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)


def plain(q, k, v):
    return torch.softmax(scores(q, k), -1) @ v


def scale_on_query(q, k, v):
    return F.softmax((q * 0.25) @ k.transpose(-1, -2), dim=-1).matmul(v)


def scale_on_both(q, k, v):
    return F.softmax((q * 0.6) @ (k / 1.7).mT, dim=-1) @ v


def scale_as_tensor(q, k, v):
    return F.softmax(q @ k.mT / torch.tensor(2.5), dim=-1) @ v


def no_scale(q, k, v):
    return (q @ k.mT).softmax(3) @ v


def swapped_contraction(q, k, v):
    return torch.softmax((k @ q.mT).mT * 0.3, -1) @ v


def transposed_softmax(q, k, v):
    return torch.softmax((k @ q.mT) * 0.3, -2).mT @ v


def einsum(q, k, v):
    return torch.einsum(
        "bhij,bhjd->bihd", torch.einsum("bhid,bhjd->bhij", q, k).mul(0.3).softmax(-1), v
    )


def einsum_key_first(q, k, v):
    return torch.einsum("bhjd,bhji->bhid", v, torch.einsum("bhjd,bhid->bhji", k, q).softmax(2))


def bmm(q, k, v):
    b, h, s, d = q.shape
    q, k, v = (x.reshape(b * h, -1, d) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(d**-0.5).softmax(-1), v).view(b, h, s, d)


def baddbmm(q, k, v):
    b, h, s, d = q.shape
    above = torch.ones(s, k.shape[2], dtype=torch.bool).triu(1)
    mask = torch.zeros(1, s, k.shape[2], dtype=q.dtype).masked_fill(above, -1e4)
    p = torch.baddbmm(
        mask, q.reshape(b * h, s, d), k.reshape(b * h, -1, d).transpose(1, 2), alpha=0.3
    )
    return (
        torch.bmm(p.softmax(-1), v.reshape(b * h, -1, d))
        .view(b, h, s, d)
        .transpose(1, 2)
        .reshape(b, s, h * d)
    )


def three_dims(q, k, v):
    return torch.softmax(q[:, 0] @ k[:, 0].mT * 0.4, -1) @ v[:, 0]


def two_dims(q, k, v):
    return torch.softmax(q[0, 0] @ k[0, 0].mT * 0.4, -1) @ v[0, 0]


def two_dims_linear(q, k, v):
    return F.linear(F.linear(q[0, 0], k[0, 0]).mul(0.4).softmax(-1), v[0, 0].mT)


def two_dims_mm(q, k, v):
    return torch.mm(torch.mm(q[0, 0], k[0, 0].t()).div(2.0).softmax(1), v[0, 0])


def two_dims_inner(q, k, v):
    return torch.tensordot(torch.inner(q[0, 0], k[0, 0]).mul(0.4).softmax(-1), v[0, 0], dims=1)


def two_dims_tensordot(q, k, v):
    return torch.tensordot(q[0, 0], k[0, 0].mT, dims=([1], [0])).softmax(-1) @ v[0, 0]


def two_dims_addmm(q, k, v, table):
    s = torch.addmm(table[0, 0], q[0, 0], k[0, 0].t(), beta=0.5, alpha=0.4)
    return s.softmax(-1) @ v[0, 0]


def linear_with_bias(q, k, v, table):
    return F.linear(q[0, 0], k[0, 0], table[0, 0, 0]).softmax(-1) @ v[0, 0]


def causal_inf(q, k, v):
    s = scores(q, k)
    return s.masked_fill(above(s), float("-inf")).softmax(-1) @ v


def causal_tril(q, k, v):
    s = scores(q, k)
    keep = torch.tril(torch.ones(s.shape[-2], s.shape[-1])).view(1, 1, *s.shape[-2:])
    return s.masked_fill(keep == 0, -1e9).softmax(-1) @ v


def causal_where(q, k, v):
    s = scores(q, k)
    i, j = torch.arange(s.shape[-2]), torch.arange(s.shape[-1])
    return torch.where(j[None, :] <= i[:, None], s, -1e4).softmax(-1) @ v


def causal_added(q, k, v):
    s = scores(q, k)
    return (s + torch.full(s.shape[-2:], float("-inf"), dtype=s.dtype).triu(1)).softmax(-1) @ v


def causal_one_minus(q, k, v):
    s = scores(q, k)
    keep = torch.ones(s.shape[-2:], dtype=s.dtype).tril()[None, None]
    return (s + (1.0 - keep) * -1e9).softmax(-1) @ v


def causal_finfo_tensor(q, k, v):
    s = scores(q, k)
    keep = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    return (
        torch.where(keep, s, torch.full([], torch.finfo(s.dtype).min, dtype=s.dtype)).softmax(-1)
        @ v
    )


def causal_cast(q, k, v):
    s = scores(q, k).masked_fill(~above(q @ k.mT).logical_not(), float("-inf"))
    return F.softmax(s, -1, dtype=torch.float32).to(q.dtype) @ v


def causal_twice(q, k, v):
    s = scores(q, k)
    s = s.masked_fill(above(s), float("-inf"))
    return (
        s.masked_fill(
            torch.arange(s.shape[-1]) > torch.arange(s.shape[-2])[:, None], torch.finfo(s.dtype).min
        ).softmax(-1)
        @ v
    )


def causal_tutorial(q, k, v):
    keep = (torch.triu(torch.ones(q.shape[-2], k.shape[-2])) == 1).transpose(0, 1)
    mask = keep.float().masked_fill(keep == 0, float("-inf")).masked_fill(keep == 1, 0.0)
    return (scores(q, k) + mask.to(q.dtype)).softmax(-1) @ v


def causal_logarithm(q, k, v):
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=q.dtype).tril()
    return (scores(q, k) + keep.log()).softmax(-1) @ v


def causal_clamped(q, k, v):
    mask = torch.full((q.shape[-2], k.shape[-2]), float("-inf")).triu(1)
    return (scores(q, k) + mask.clamp(min=-1e9).to(q.dtype)).softmax(-1) @ v


def causal_subsequent(q, k, v):
    mask = torch.nn.Transformer.generate_square_subsequent_mask(q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))


def full_mask(q, k, v):
    s = scores(q, k)
    return s.masked_fill(torch.arange(s.shape[-1]) < 0, float("-inf")).softmax(-1) @ v


def by_hand(q, k, v):
    s = scores(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def by_hand_max(q, k, v):
    s = scores(q, k)
    e = torch.exp(s - s.max(dim=-1, keepdim=True).values.detach())
    return (e / e.sum(dim=-1, keepdim=True)) @ v


def by_hand_unshifted(q, k, v):
    e = scores(q, k).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def late_division(q, k, v):
    s = scores(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


def by_hand_unsqueezed(q, k, v):
    s = scores(q, k)
    e = torch.exp(s - s.max(-1)[0][..., None])
    return (e / e.sum(-1)[..., None]) @ v


def late_division_unsqueezed(q, k, v):
    e = torch.exp(scores(q, k))
    return (e @ v) / e.sum(-1).unsqueeze(-1)


def late_reciprocal(q, k, v):
    e = torch.exp(scores(q, k))
    return torch.einsum("bhij,bhjd->bhid", e, v) * e.sum(-1, keepdim=True).reciprocal()


def by_logsumexp(q, k, v):
    s = scores(q, k)
    return torch.exp(s - s.logsumexp(-1, keepdim=True)) @ v


def by_log_softmax(q, k, v):
    return F.log_softmax(scores(q, k), -1).exp() @ v


def padding(q, k, v, mask):
    s = scores(q, k)
    return s.masked_fill(mask[:, None, None, :] < 0, torch.finfo(s.dtype).min).softmax(-1) @ v


def padding_and_causal(q, k, v, mask):
    s = scores(q, k)
    keep = (mask[:, None, None, :] >= 0) & above(s).logical_not()
    return torch.where(keep, s, float("-inf")).softmax(-1) @ v


def added_mask(q, k, v, mask):
    return (scores(q, k) + mask[:, None, None, :]).softmax(-1) @ v


def bias(q, k, v, table):
    return (scores(q, k) + table).softmax(-1) @ v


def window(q, k, v):
    s = scores(q, k)
    i, j = torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])
    return s.masked_fill((j > i) | (j < i - 3), float("-inf")).softmax(-1) @ v


def window_added(q, k, v):
    masked = torch.full((q.shape[-2], k.shape[-2]), float("-inf"), dtype=q.dtype)
    return (scores(q, k) + masked.triu(1) + masked.tril(-4)).softmax(-1) @ v


def repeated_heads(q, k, v):
    b, g, s, d = k.shape
    k, v = (x[:, :, None].expand(b, g, q.shape[1] // g, s, d).reshape(b, -1, s, d) for x in (k, v))
    return plain(q, k, v)


def repeat_interleave(q, k, v):
    return plain(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))


def tiled_heads(q, k, v):
    return plain(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))


def grouped_einsum(q, k, v):
    b, h, s, d = q.shape
    q = q.view(b, k.shape[1], -1, s, d)
    p = torch.einsum("bgrid,bgjd->bgrij", q, k).mul(0.3).softmax(-1)
    return torch.einsum("bgrij,bgjd->bgrid", p, v).reshape(b, h, s, d)


def one_key_head(q, k, v):
    return plain(q, k[:, :1], v[:, :1])


def alibi(q, k, v):
    s = scores(q, k)
    slopes = torch.pow(0.25, torch.arange(1, q.shape[1] + 1)).to(s.dtype)[:, None, None]
    distance = torch.arange(s.shape[-1]) - torch.arange(s.shape[-2])[:, None]
    s = s + slopes * distance.to(s.dtype)
    return s.masked_fill(above(s), torch.finfo(s.dtype).min).softmax(-1) @ v


def scaled_after_bias(q, k, v, table):
    s = (q @ k.mT + table).masked_fill(above(q @ k.mT), -1e9)
    return (s / 3.0).softmax(-1) @ v


def masked_bias(q, k, v, table):
    keep = ~above(q @ k.mT)
    low = torch.finfo(q.dtype).min
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(keep, table, low))


def masked_bias_copied(q, k, v, table):
    keep = ~above(q @ k.mT)
    low = torch.finfo(q.dtype).min
    mask = torch.where(keep, table, low).clone().contiguous()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def alibi_repeated(q, k, v):
    """The slopes' product for one batch, repeated for all, as in Bloom."""
    b, h, rows, _ = q.shape
    slopes = torch.pow(0.25, torch.arange(1, h + 1))[:, None, None]
    bias = (slopes * torch.arange(k.shape[2])).repeat(b, 1, 1).to(q.dtype)
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    s = torch.baddbmm(bias, q, k.mT, alpha=0.3).view(b, h, rows, -1)
    mask = torch.where(above(s), torch.finfo(s.dtype).min, torch.zeros((), dtype=s.dtype))
    return (s + mask).softmax(-1) @ v


def windows(q, k, v, table):
    """Batches of windows, each with a mask of its own, as in Swin."""
    s = scores(q, k)
    b, h, rows, columns = s.shape
    s = s.view(b // 2, 2, h, rows, columns) + table[0, :2, None]
    return s.view(b, h, rows, columns).softmax(-1) @ v


def packed_projection(q, k, v):
    packed = torch.stack([q, k, v], 3).transpose(1, 2)
    b, s, h, _, d = packed.shape
    x = packed.permute(3, 0, 2, 1, 4)
    q, k, v = x.unbind(0)
    return plain(q, k, v).transpose(1, 2).reshape(b, s, h * d)


def learned_temperature(q, k, v, table):
    return (q @ k.mT * table[0, 0, 0, 0].exp()).softmax(-1) @ v


def library(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=0.2)


def library_causal_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~above(q @ k.mT))


def library_grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def library_bias(q, k, v, table):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=table)


def _mask() -> Tensor:
    mask = torch.zeros(2, 7)
    mask[1, 5:] = -1e9
    return mask


def _table() -> Tensor:
    return torch.randn(1, 4, 7, 7, generator=torch.Generator().manual_seed(5)).requires_grad_()


def cases() -> list[Any]:
    square, cross, grouped = heads(), heads(columns=9), heads(groups=2)
    long = heads(rows=150, columns=150, heads=2)
    table: list[tuple[Callable[..., Any], str, dict[str, Tensor]]] = [
        *(
            (f, "full", square)
            for f in (
                plain,
                scale_on_query,
                scale_on_both,
                scale_as_tensor,
                no_scale,
                swapped_contraction,
                transposed_softmax,
                einsum,
                einsum_key_first,
                bmm,
                three_dims,
                two_dims,
                two_dims_linear,
                two_dims_mm,
                two_dims_inner,
                two_dims_tensordot,
                full_mask,
                by_hand,
                by_hand_max,
                by_hand_unshifted,
                late_division,
                by_hand_unsqueezed,
                late_reciprocal,
                late_division_unsqueezed,
                by_logsumexp,
                by_log_softmax,
                library,
            )
        ),
        *((f, "full", cross) for f in (plain, einsum_key_first, bmm, late_division)),
        *(
            (f, "causal", square)
            for f in (
                baddbmm,
                causal_inf,
                causal_tril,
                causal_where,
                causal_added,
                causal_one_minus,
                causal_finfo_tensor,
                causal_cast,
                causal_twice,
                causal_tutorial,
                causal_logarithm,
                causal_clamped,
                causal_subsequent,
                library_causal_mask,
            )
        ),
        (causal_inf, "causal", long),
        (causal_tril, "causal", cross),
        (padding, "mask", {**square, "mask": _mask()}),
        (padding_and_causal, "causal+mask", {**square, "mask": _mask()}),
        (added_mask, "bias", {**square, "mask": _mask()}),
        (bias, "bias", {**square, "table": _table()}),
        *(
            (f, "bias", {**square, "table": _table()})
            for f in (windows, two_dims_addmm, linear_with_bias)
        ),
        (learned_temperature, "full", {**square, "table": _table()}),
        (packed_projection, "full", square),
        (alibi, "causal+bias", square),
        (scaled_after_bias, "mask+bias", {**square, "table": _table()}),
        (masked_bias, "mask+bias", {**square, "table": _table()}),
        (masked_bias_copied, "mask+bias", {**square, "table": _table()}),
        (alibi_repeated, "causal+bias", square),
        (library_bias, "bias", {**square, "table": _table()}),
        (window, "causal+mask", square),
        (window_added, "causal+mask", square),
        *(
            (f, "gqa", grouped)
            for f in (repeated_heads, repeat_interleave, tiled_heads, grouped_einsum)
        ),
        (one_key_head, "gqa", square),
        (library_grouped, "gqa+causal", grouped),
    ]
    return [
        pytest.param(f, v, x, id=f"{f.__name__}-{x['q'].shape[2]}x{x['k'].shape[2]}")
        for f, v, x in table
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("function", "variant", "inputs"), cases())
def test_taken(
    function: Callable[..., Any], variant: str, inputs: dict[str, Tensor], dtype: torch.dtype
) -> None:
    made: list[Compiled] = []

    def compile_(module: Spelling) -> Compiled:
        made.append(Compiled(module))
        return made[0]

    assert_as_accurate_as_eager(lambda: Spelling(function), inputs, compile_, dtype=dtype)
    assert made[0].variants == [variant], made[0].misses
    assert made[0].misses == []


@pytest.mark.parametrize(
    "function",
    [
        plain,
        causal_inf,
        causal_where,
        bmm,
        einsum,
        padding_and_causal,
        repeated_heads,
        two_dims_linear,
        two_dims_inner,
    ],
)
def test_lengths_change_without_recompiling(function: Callable[..., Any]) -> None:
    compiled = Compiled(function, dynamic=True)
    for batch, length in ((6, 7), (3, 11), (5, 130)):
        inputs = heads(
            batch=batch, rows=length, columns=length, groups=2 if function is repeated_heads else 0
        )
        if function is padding_and_causal:
            inputs["mask"] = torch.zeros(batch, length)
        torch.testing.assert_close(compiled(**inputs), function(**inputs))
    assert len(compiled.graphs) == 1
    assert len(compiled.variants) == 1
