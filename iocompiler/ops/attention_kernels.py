"""The library kernels behind `iocompiler::attention_forward` and its backward, one pair of
functions a kernel.

Each forward returns (out, logsumexp, seed, offset), each backward (dquery, dkey, dvalue, dbias or
None), in whatever layout the kernel likes; `ops.attention` arranges them. Seed and offset are the
random state a kernel's dropout needs in its backward; without dropout they are empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from iocompiler.ops import attention_blockwise as blockwise
from iocompiler.ops.attention_given import (
    in_rows,
    laid_out_like,
    padded_head,
    repeated_heads,
    spread_bias,
    summed_bias,
)

aten = torch.ops.aten
Forward: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
Backward: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None]
LSE_ALIGNMENT = 32  # of the memory-efficient kernel
_DROWNS = -1e8  # a logarithm added to this is lost in rounding


@dataclass(frozen=True)
class Setting:
    """What does not change between forward and backward."""

    scale: float
    causal: bool
    dropout_p: float


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, s: Setting) -> Forward:
    out, lse, _, _, _, _, seed, offset, _ = _cudnn(q, k, v, bias, s, lse=True)
    return out, lse.reshape(q.shape[:3]), *_state(q, s, seed, offset)


def cudnn_output(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, s: Setting) -> Tensor:
    """`cudnn_forward` without what its backward reads."""
    out: Tensor = _cudnn(q, k, v, bias, s, lse=False)[0]
    return out


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, s: Setting, lse: bool
) -> tuple[Any, ...]:
    q, k, v = (in_rows(x) for x in (q, k, v))
    mask, dropout_p = spread_bias(q, k, bias), _own_rate(s.dropout_p)
    found: tuple[Any, ...] = aten._scaled_dot_product_cudnn_attention(
        q, k, v, mask, lse, dropout_p, s.causal, False, scale=s.scale
    )
    return found


def cudnn_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    saved: Forward,
    s: Setting,
    _: bool,
) -> Backward:
    out, lse, seed, offset = _saved(saved)
    grad, q, k, v = (in_rows(x) for x in (grad, q, k, v))
    # torch finds the graph cuDNN built for an earlier call by the strides of q, k and v alone (2.11
    # to 2.15): an output laid out otherwise than by its own forward, or its gradient, would be read
    # with the strides of that call
    out, grad = laid_out_like(out, q), laid_out_like(grad, q)
    state = (seed, offset, spread_bias(q, k, bias), None, None, q.shape[2], k.shape[2])
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse.unsqueeze(-1),
        *state,
        _own_rate(s.dropout_p),
        s.causal,
        scale=s.scale,
    )
    return dq, dk, dv, None


def _own_rate(dropout_p: float) -> float:
    """The same rate as no other caller gives it: -0.0, or a float32 just above.

    Its bits are part of what torch finds cuDNN's graphs by, so none of ours is used for a call of
    eager's with the same strides of q, k and v and another layout of the gradient, nor the reverse.
    """
    return dropout_p * (1 + 2**-23) if dropout_p else -0.0


def flash_forward(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None, s: Setting) -> Forward:
    width = q.shape[3]
    q, k, v = (padded_head(x) for x in (q, k, v))
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(
        q, k, v, s.dropout_p, s.causal, False, scale=s.scale
    )
    return out[..., :width], lse, *_state(q, s, seed, offset)


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _: Tensor | None,
    saved: Forward,
    s: Setting,
    __: bool,
) -> Backward:
    width = q.shape[3]
    out, lse, seed, offset = _saved(saved)
    grad, q, k, v, out = (padded_head(x) for x in (grad, q, k, v, out))
    lengths = (None, None, q.shape[2], k.shape[2])
    setting = (s.dropout_p, s.causal, seed, offset)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, *lengths, *setting, scale=s.scale
    )
    return dq[..., :width], dk[..., :width], dv[..., :width], None


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, s: Setting) -> Forward:
    width = v.shape[3]
    q, k, v = repeated_heads(q, k, v)
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
        *(padded_head(x) for x in (q, k, v)),
        spread_bias(q, k, bias),
        True,
        s.dropout_p,
        s.causal,
        scale=s.scale,
    )
    return out[..., :width], lse, *_state(q, s, seed, offset)


def efficient_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    saved: Forward,
    s: Setting,
    bias_grad: bool,
) -> Backward:
    groups, widths = k.shape[1], (q.shape[3], k.shape[3], v.shape[3])
    out, lse, seed, offset = _saved(saved)
    if bias is not None:
        grad = _shared_out(grad, lse[:, :, : q.shape[2]], bias, k.shape[2], s)
    q, k, v = repeated_heads(q, k, v)
    wants = [True, True, True, bias_grad and bias is not None]
    dq, dk, dv, db = aten._scaled_dot_product_efficient_attention_backward(
        *(padded_head(x) for x in (grad, q, k, v)),
        spread_bias(q, k, bias),
        padded_head(out),
        lse,
        seed,
        offset,
        s.dropout_p,
        wants,
        s.causal,
        scale=s.scale,
    )
    dq, dk, dv = (x[..., :width] for x, width in zip((dq, dk, dv), widths, strict=True))
    if groups != dk.shape[1]:
        dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
    if not wants[3]:
        return dq, dk, dv, None
    # blocks above the diagonal are skipped, their part of the gradient is never written
    return dq, dk, dv, summed_bias(db.tril() if s.causal else db, bias)


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, s: Setting) -> Forward:
    out, lse, rows = cpu_library(q, k, v, bias, s)
    if rows.any():
        out = with_nan(out, rows, q)
    return out, lse, *_no_state(q)


def cpu_library(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, s: Setting
) -> tuple[Tensor, Tensor, Tensor]:
    """What the library's kernel makes of it, and the rows that it takes for masked altogether."""
    q, k, v = (in_rows(x) for x in repeated_heads(q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, s.causal, attn_mask=bias, scale=s.scale
    )
    return out, lse, lse == 0.0


def with_nan(out: Tensor, rows: Tensor, q: Tensor) -> Tensor:
    """``out`` with those of the ``rows`` that are no masked ones: their scores are NaN."""
    broken = rows & q.isnan().any(-1)
    return out.masked_fill(broken.unsqueeze(-1), float("nan"))


def cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    saved: Forward,
    s: Setting,
    bias_grad: bool,
) -> Backward:
    if bias_grad and bias is not None:  # the library's backward has none for its mask
        return blockwise_backward(grad, q, k, v, bias, saved, s, bias_grad)
    groups = k.shape[1]
    q, k, v = (in_rows(x) for x in repeated_heads(q, k, v))
    if bias is not None:
        grad = _shared_out(grad, saved[1], bias, k.shape[2], s)
    grad = in_rows(grad)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, saved[0], saved[1], 0.0, s.causal, attn_mask=bias, scale=s.scale
    )
    if groups != dk.shape[1]:
        dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv, None


def blockwise_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, s: Setting) -> Forward:
    seed, offset = _no_state(q)
    if s.dropout_p:
        seed = torch.randint(2**62, (1,), device=q.device)
    out, lse = blockwise.forward(
        q, k, v, bias, seed, scale=s.scale, causal=s.causal, dropout_p=s.dropout_p
    )
    return out, lse, seed, offset


def blockwise_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    saved: Forward,
    s: Setting,
    bias_grad: bool,
) -> Backward:
    out, lse, seed, _ = saved
    return blockwise.backward(
        grad,
        q,
        k,
        v,
        bias,
        out,
        lse,
        seed,
        scale=s.scale,
        causal=s.causal,
        dropout_p=s.dropout_p,
        bias_grad=bias_grad,
    )


OUTPUT: dict[str, Callable[..., Tensor]] = {"cudnn": cudnn_output}
"""Of kernels that make their first result for less where nobody reads the others."""
FORWARD: dict[str, Callable[..., Forward]] = {
    "cudnn": cudnn_forward,
    "flash": flash_forward,
    "efficient": efficient_forward,
    "cpu": cpu_forward,
    "blockwise": blockwise_forward,
}
BACKWARD: dict[str, Callable[..., Backward]] = {
    "cudnn": cudnn_backward,
    "flash": flash_backward,
    "efficient": efficient_backward,
    "cpu": cpu_backward,
    "blockwise": blockwise_backward,
}


def _shared_out(grad: Tensor, lse: Tensor, bias: Tensor, columns: int, s: Setting) -> Tensor:
    """The gradient of the output as a backward wants it that takes exp(score - lse) for the
    probabilities. In a row that a bias hides altogether these are 1 for the keys that it hides
    least, not 1 / n of n such keys; all that comes of the row is linear in its gradient, so that is
    divided by n.
    """
    bias = bias.expand(*bias.shape[:-1], columns)
    if s.causal:
        seen = torch.ones(grad.shape[2], columns, dtype=torch.bool, device=grad.device).tril()
        bias = bias.masked_fill(~seen, -math.inf)
    keys = (bias == bias.amax(-1, keepdim=True)).sum(-1, keepdim=True)
    return torch.where((lse < _DROWNS).unsqueeze(-1), grad / keys, grad)


def _no_state(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty((0,), dtype=torch.int64), q.new_empty((0,), dtype=torch.int64)


def _state(q: Tensor, s: Setting, seed: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    return (seed, offset) if s.dropout_p else _no_state(q)


def _saved(saved: Forward) -> Forward:
    out, lse, seed, _ = saved
    if seed.numel():
        return saved
    none = torch.empty((), dtype=torch.int64, device=out.device)
    return out, lse, none, none
