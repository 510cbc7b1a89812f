"""What the library's attention kernels are given, laid out as they load it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BIAS_ALIGNMENT = 16


def in_rows(x: Tensor) -> Tensor:
    """With the head dim contiguous, as every kernel wants it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def laid_out_like(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the memory order in which a kernel allocates a result of ``like``'s shape."""
    wanted = torch.empty_like(like, device="meta").stride()
    if all(n <= 1 or a == b for n, a, b in zip(x.shape, x.stride(), wanted, strict=True)):
        return x
    return torch.empty_strided(x.shape, wanted, dtype=x.dtype, device=x.device).copy_(x)


def padded_head(x: Tensor) -> Tensor:
    """Head dim up to a multiple of 8, as the kernels load it; zeros change no dot product."""
    x = in_rows(x)
    return x if x.shape[-1] % 8 == 0 else F.pad(x, (0, 8 - x.shape[-1] % 8))


def repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Key and value heads repeated to those of the query, for the kernels that know no groups."""
    repeat = q.shape[1] // k.shape[1]
    if repeat == 1:
        return q, k, v
    return q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)


def spread_bias(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor | None:
    """The bias seen as [B, H, S, K], rows aligned as the kernels load them."""
    if bias is None:
        return None
    length = k.shape[2]
    bias = bias.expand(*bias.shape[:-1], length)
    if (
        length % _BIAS_ALIGNMENT
        or bias.stride(-1) != 1
        or any(x % _BIAS_ALIGNMENT for x in bias.stride()[:-1])
    ):
        bias = F.pad(bias, (0, -length % _BIAS_ALIGNMENT))[..., :length]
    return bias.expand(q.shape[0], q.shape[1], q.shape[2], length)


def summed_bias(gradient: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is not None
    return gradient.sum_to_size((1,) * (4 - bias.dim()) + bias.shape).reshape(bias.shape)
