"""Layer, group and batch norm: statistics from two passes, gradients as plain sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from iocompiler.ops.decomposed.arithmetic import cast, count, wide
from iocompiler.ops.decomposed.moments import moments
from iocompiler.versions import group_norm_keeps_channels_last

aten = torch.ops.aten
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def native_layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten.native_layer_norm: (result in x's dtype, mean, 1 / standard deviation), statistics wide.

    aten's CPU kernel rounds the statistics to x's dtype, its CUDA kernel does not; nor do we.
    """
    rank = x.dim()
    dims = list(range(rank - len(normalized_shape), rank))
    variance, mean, deviation = moments(wide(x), dims, 0)
    rstd = (variance + eps).rsqrt()
    out = deviation * rstd
    if weight is not None:
        out = out * wide(weight)
    if bias is not None:
        out = out + wide(bias)
    return cast(out, x.dtype).contiguous(), mean, rstd


def native_layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Sequence[bool],
) -> Gradients:
    """dx = rstd * (g - mean(g) - n * mean(g * n)), n the normalised x and g = grad * weight.

    Of one number n and dx are 0 (or NaN). Subtracting would leave a rounding, times rstd and its
    square, where x or g is a product: of these a multiply-add subtracts the rounded from the exact.
    """
    axis = x.dim() - len(normalized_shape)
    inner, outer = list(range(axis, x.dim())), list(range(axis))
    size = count(x, inner)
    single = isinstance(size, int) and size == 1
    wide_grad = wide(grad)
    normal = wide(x) * 0 if single else (wide(x) - wide(mean)) * wide(rstd)
    dx = dweight = dbias = None
    if mask[0]:
        scaled = wide_grad if weight is None else wide_grad * wide(weight)
        if single:
            dx = (scaled + normal) * 0
        else:
            dx = _normal_backward(scaled, normal, wide(rstd), inner)
        dx = cast(dx, x.dtype).contiguous()
    if mask[1] and weight is not None:
        dweight = cast(_summed(wide_grad * normal, outer), weight.dtype)
    if mask[2] and bias is not None:
        dbias = cast(_summed(wide_grad, outer), bias.dtype)
    return dx, dweight, dbias


def _normal_backward(grad: Tensor, normal: Tensor, rstd: Tensor, dims: list[int]) -> Tensor:
    centre = aten.mean.dim(grad, dims, True)
    along = aten.mean.dim(grad * normal, dims, True)
    result: Tensor = (grad - centre - normal * along) * rstd
    return result


def _summed(x: Tensor, dims: list[int]) -> Tensor:
    return aten.sum.dim_IntList(x, dims) if dims else x


def native_group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    channels: int,
    inner: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten.native_group_norm of x [n, channels, ...]: (result, mean, rstd [n, groups])."""
    value = wide(x).reshape(n, groups, channels // groups, inner)
    variance, mean, deviation = moments(value, [2, 3], 0)
    rstd = (variance + eps).rsqrt()
    out = deviation * rstd
    if weight is not None:
        out = out * _by_group(weight, groups)
    if bias is not None:
        out = out + _by_group(bias, groups)
    mean, rstd = (cast(s.reshape(n, groups), x.dtype) for s in (mean, rstd))
    return _laid_out(cast(out.reshape(x.shape), x.dtype), x), mean, rstd


def native_group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    n: int,
    channels: int,
    inner: int,
    groups: int,
    mask: Sequence[bool],
) -> Gradients:
    """As `native_layer_norm_backward`, over [n, groups, channels / groups, inner]."""
    shape = (n, groups, channels // groups, inner)
    kept = x.dtype if weight is None else weight.dtype
    wide_grad, scale = wide(grad).reshape(shape), wide(rstd).reshape(n, groups, 1, 1)
    normal = (wide(x).reshape(shape) - wide(mean).reshape(n, groups, 1, 1)) * scale
    dx = dweight = dbias = None
    if mask[0]:
        scaled = wide_grad if weight is None else wide_grad * _by_group(weight, groups)
        dx = cast(_normal_backward(scaled, normal, scale, [2, 3]).reshape(x.shape), x.dtype)
        dx = _laid_out(dx, x)
    if mask[1]:
        dweight = cast(_summed(wide_grad * normal, [0, 3]).reshape(channels), kept)
    if mask[2]:
        dbias = cast(_summed(wide_grad, [0, 3]).reshape(channels), kept)
    return dx, dweight, dbias


def _laid_out(result: Tensor, x: Tensor) -> Tensor:
    """As aten's group norm lays out what it makes of ``x``."""
    keeps = group_norm_keeps_order(x)
    return (
        result.contiguous(memory_format=suggest_memory_format(x)) if keeps else result.contiguous()
    )


def group_norm_keeps_order(x: Tensor) -> bool:
    """Whether aten's group norm returns channels last for channels last. Fake tensors always do."""
    return x.device.type == "cpu" or group_norm_keeps_channels_last()


def _by_group(x: Tensor, groups: int) -> Tensor:
    return wide(x).reshape(1, groups, -1, 1)


def native_batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_rstd: Tensor | None,
    train: bool,
    eps: float,
    mask: Sequence[bool],
) -> Gradients:
    """aten.native_batch_norm_backward of x [n, channels, ...]."""
    dims = [0, *range(2, x.dim())]

    def spread(per_channel: Tensor) -> Tensor:
        return wide(per_channel).reshape(-1, *[1] * (x.dim() - 2))

    mean, rstd = save_mean, save_rstd
    if not train:
        assert running_mean is not None
        assert running_var is not None
        mean, rstd = running_mean, (wide(running_var) + eps).rsqrt()
    assert mean is not None
    assert rstd is not None
    wide_grad, normal = wide(grad), (wide(x) - spread(mean)) * spread(rstd)
    dbias, dweight = _summed(wide_grad, dims), _summed(wide_grad * normal, dims)
    dx = wide_grad
    if train:
        size = count(x, dims)
        dx = wide_grad - spread(dbias / size) - normal * spread(dweight / size)
    dx = dx * spread(rstd if weight is None else wide(rstd) * wide(weight))
    kept = x.dtype if weight is None else weight.dtype
    found = cast(dx, x.dtype), cast(dweight, kept), cast(dbias, kept)
    return found[0], found[1] if mask[1] else None, found[2] if mask[2] else None


DECOMPOSITIONS = {
    aten.native_layer_norm.default: native_layer_norm,
    aten.native_layer_norm_backward.default: native_layer_norm_backward,
    aten.native_group_norm.default: native_group_norm,
    aten.native_group_norm_backward.default: native_group_norm_backward,
    aten.native_batch_norm_backward.default: native_batch_norm_backward,
}
