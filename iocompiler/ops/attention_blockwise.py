"""Attention in plain aten, some query rows at a time: the reference, and what runs where no library
kernel does.

Memory is linear in the lengths: one block of rows against all keys is alive at a time. Accumulation
is float32 (float64 for float64 inputs). Dropout is replayed in the backward from its seed, block by
block.

Tri Dao et al., "FlashAttention", arXiv 2205.14135, equations (1) to (4) of its backward, with the
keys not split.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 128


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    *,
    scale: float,
    causal: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T + bias) @ value.

    Args:
        query: [B, H, S, D]; key [B, G, K, D] and value [B, G, K, E] where G divides H (query head h
            reads head
            h // (H / G)).
        bias: None, or broadcastable to [B, H, S, K].
        seed: one int64, what dropout is replayed from; read only where ``dropout_p`` is not 0.
        causal: query i sees the keys j <= i.

    Returns:
        the output [B, H, S, E] in the inputs' dtype, and the log-sum-exp of each row [B, H, S],
        float32 or float64. A row with every score at -inf gives zeros and -inf.
    """
    wide = _wide(query.dtype)
    keys, values = (_spread(x, query.shape[1]).to(wide) for x in (key, value))
    outs, sums = [], []
    for number, rows in _blocks(query.shape[2]):
        scores = _scores(query[:, :, rows].to(wide), keys, bias, rows, scale, causal)
        lse = torch.logsumexp(scores, -1)
        probabilities = _probabilities(scores, lse)
        kept = _keep(probabilities, seed, number, dropout_p)
        outs.append(kept @ values)
        sums.append(lse)
    if not outs:
        return query.new_zeros((*query.shape[:3], value.shape[3])), query.new_zeros(
            query.shape[:3], dtype=wide
        )
    return torch.cat(outs, 2).to(query.dtype), torch.cat(sums, 2)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    *,
    scale: float,
    causal: bool,
    dropout_p: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `forward` to query, key, value and (where ``bias_grad``) bias, in their
    shapes and dtypes.
    """
    wide = _wide(query.dtype)
    heads, groups = query.shape[1], key.shape[1]
    keys, values = (_spread(x, heads).to(wide) for x in (key, value))
    dq = torch.zeros(query.shape, dtype=wide, device=query.device)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    db = (
        torch.zeros(bias.shape, dtype=wide, device=bias.device)
        if bias is not None and bias_grad
        else None
    )
    for number, rows in _blocks(query.shape[2]):
        q, g = query[:, :, rows].to(wide), grad[:, :, rows].to(wide)
        scores = _scores(q, keys, bias, rows, scale, causal)
        probabilities = _probabilities(scores, lse[:, :, rows])
        delta = (g * out[:, :, rows].to(wide)).sum(-1, keepdim=True)
        dv += _keep(probabilities, seed, number, dropout_p).transpose(2, 3) @ g
        ds = probabilities * (_keep(g @ values.transpose(2, 3), seed, number, dropout_p) - delta)
        if db is not None:
            part = db[..., rows, :] if db.shape[-2] != 1 else db
            part += ds.sum_to_size(part.shape) if db.dim() == 4 else _sum_to(ds, part)
        dq[:, :, rows] = (ds @ keys) * scale
        dk += (ds.transpose(2, 3) @ q) * scale
    return (
        dq.to(query.dtype),
        _gather(dk, groups).to(key.dtype),
        _gather(dv, groups).to(value.dtype),
        db.to(bias.dtype) if db is not None and bias is not None else None,
    )


def _blocks(length: int) -> Iterator[tuple[int, slice]]:
    for number, start in enumerate(range(0, length, ROWS)):
        yield number, slice(start, min(start + ROWS, length))


def _scores(
    q: Tensor, keys: Tensor, bias: Tensor | None, rows: slice, scale: float, causal: bool
) -> Tensor:
    scores = (q @ keys.transpose(2, 3)) * scale
    if bias is not None:
        scores = scores + (bias[..., rows, :] if bias.shape[-2] != 1 else bias).to(scores.dtype)
    if causal:
        i = torch.arange(rows.start, rows.stop, device=q.device).unsqueeze(1)
        j = torch.arange(keys.shape[2], device=q.device)
        scores = scores.masked_fill(j > i, float("-inf"))
    return scores


def _keep(x: Tensor, seed: Tensor, number: int, dropout_p: float) -> Tensor:
    """``x`` with the entries dropped that the seed says, the others scaled by 1 / (1 - p)."""
    if dropout_p == 0.0:
        return x
    if dropout_p >= 1.0:
        return torch.zeros_like(x)
    generator = torch.Generator(device=x.device)
    generator.manual_seed(int(seed.reshape(-1)[0]) + number)
    draw = torch.rand(x.shape, device=x.device, generator=generator)
    return torch.where(draw >= dropout_p, x / (1.0 - dropout_p), 0.0)


def _spread(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _gather(x: Tensor, groups: int) -> Tensor:
    if x.shape[1] == groups:
        return x
    return x.reshape(x.shape[0], groups, -1, *x.shape[2:]).sum(2)


def _sum_to(x: Tensor, like: Tensor) -> Tensor:
    return x.sum_to_size((1,) * (x.dim() - like.dim()) + like.shape).reshape(like.shape)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """Of whole rows, not from their log-sum-exp: beside one large negative number in every score
    the logarithm of how many there are is lost.
    """
    return scores.softmax(-1).masked_fill((lse == float("-inf")).unsqueeze(-1), 0.0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
