"""Negative log likelihood without a scatter, the class picked by comparing positions with the
target; and gradients of means that divide by the number of elements as a tensor does (0 of them, or
a symbol).
"""

from __future__ import annotations

import torch
from torch import Tensor

from iocompiler.ops.decomposed.arithmetic import cast, count, wide

aten = torch.ops.aten
_NONE, _MEAN, _SUM = 0, 1, 2


def _channel(x: Tensor) -> int:
    return 1 if x.dim() > 1 else 0


def _factors(
    target: Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which targets count, the targets with the others set to 0, and the (wide) weight of each."""
    counts = target != ignore_index
    safe = torch.where(counts, target, 0)
    if weight is None:
        return counts, safe, cast(counts, torch.float32)
    picked = wide(aten.index_select.default(weight, 0, safe.reshape(-1))).reshape(safe.shape)
    return counts, safe, torch.where(counts, picked, 0.0)


def nll_loss_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """aten.nll_loss_forward, and nll_loss2d_forward: x [N, C, ...] or [C]."""
    channel = _channel(x)
    counts, safe, factor = _factors(target, weight, ignore_index)
    factor = cast(factor, wide(x).dtype)
    picked = aten.gather.default(x, channel, safe.unsqueeze(channel)).squeeze(channel)
    loss = torch.where(counts, -wide(picked) * factor, 0.0)
    if reduction == _NONE and x.dim() > 1:
        return cast(loss, x.dtype), x.new_zeros(())
    total = factor.sum()
    if reduction == _MEAN:
        loss = loss.sum() / total
    elif reduction == _SUM:
        loss = loss.sum()
    return cast(loss, x.dtype), cast(total, x.dtype)


def nll_loss_backward(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Tensor:
    """-grad * weight[target] at the target's place, 0 elsewhere: a comparison with an iota, no
    scatter.
    """
    channel = _channel(x)
    counts, safe, factor = _factors(target, weight, ignore_index)
    scale = -wide(grad) * cast(factor, wide(x).dtype)
    if reduction == _MEAN:
        scale = scale / _total(factor, total_weight)
    scale = torch.where(counts, scale, 0.0).unsqueeze(channel)
    classes = torch.arange(x.shape[channel], device=x.device)
    classes = classes.reshape([-1] + [1] * (x.dim() - channel - 1))
    here = classes == safe.unsqueeze(channel)
    return cast(torch.where(here, scale, 0.0), x.dtype)


def _total(factor: Tensor, total_weight: Tensor) -> Tensor:
    """The sum of weights, made again where it was rounded (no bfloat16 counts beyond 256)."""
    return wide(total_weight) if wide(total_weight).dtype == total_weight.dtype else factor.sum()


def mse_loss_backward(grad: Tensor, x: Tensor, y: Tensor, reduction: int) -> Tensor:
    """2 * grad * (x - y), over the number of elements for a mean."""
    return _scaled(2 * wide(grad) * (wide(x) - wide(y)), x, reduction)


def smooth_l1_loss_backward(
    grad: Tensor, x: Tensor, y: Tensor, reduction: int, beta: float
) -> Tensor:
    """grad * d / beta within beta of zero, else grad * sign(d), for d = x - y."""
    way = wide(x) - wide(y)
    slope = way.sign()
    if beta > 0:
        slope = torch.where(way.abs() >= beta, slope, way / beta)  # NaN, of no sign, is kept
    return _scaled(wide(grad) * slope, x, reduction)


def huber_loss_backward(grad: Tensor, x: Tensor, y: Tensor, reduction: int, delta: float) -> Tensor:
    """grad * clamp(x - y, -delta, delta)."""
    return _scaled(wide(grad) * (wide(x) - wide(y)).clamp(-delta, delta), x, reduction)


def _scaled(gradient: Tensor, x: Tensor, reduction: int) -> Tensor:
    return cast(gradient / count(x, range(x.dim())) if reduction == _MEAN else gradient, x.dtype)


DECOMPOSITIONS = {
    aten.mse_loss_backward.default: mse_loss_backward,
    aten.smooth_l1_loss_backward.default: smooth_l1_loss_backward,
    aten.huber_loss_backward.default: huber_loss_backward,
    aten.nll_loss_forward.default: nll_loss_forward,
    aten.nll_loss_backward.default: nll_loss_backward,
    aten.nll_loss2d_forward.default: nll_loss_forward,
    aten.nll_loss2d_backward.default: nll_loss_backward,
}
