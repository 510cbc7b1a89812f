"""Variance, and the norms that need more than torch's own decompositions give.

The variance is always two-pass, ``sum((x - mean)^2) / (n - correction)``: ``E[x^2] - E[x]^2`` loses every digit where
the mean is large against the deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iocompiler.ops.decomposed.arithmetic import cast, count, positive, wide

aten = torch.ops.aten


def moments(x: Tensor, dims: Sequence[int], correction: float) -> tuple[Tensor, Tensor]:
    """Variance and mean of ``x`` (already wide) over ``dims``, kept as dimensions of size one."""
    size = count(x, dims)
    mean = aten.mean.dim(x, dims, True)
    deviation = x - mean
    total = aten.sum.dim_IntList(deviation * deviation, dims, True)
    return total / _degrees(size, correction), mean


def _degrees(size: Any, correction: float) -> Any:
    free = size - (int(correction) if float(correction).is_integer() else correction)
    if isinstance(free, (int, float)):
        return max(free, 0)
    return torch.sym_max(free, 0)


def _squeezed(x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    return x if keepdim else x.squeeze(list(dims))


def var_mean(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """aten.var_mean.correction; both results in x's dtype."""
    if x.is_complex():
        return NotImplemented
    dims = positive(dim, x.dim())
    found = moments(wide(x), dims, 1 if correction is None else correction)
    variance, mean = (cast(_squeezed(f, dims, keepdim), x.dtype) for f in found)
    return variance, mean


def var(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    """aten.var.correction."""
    if x.is_complex():
        return NotImplemented
    return var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def std(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    """aten.std.correction: the root is taken before rounding."""
    if x.is_complex():
        return NotImplemented
    dims = positive(dim, x.dim())
    variance, _ = moments(wide(x), dims, 1 if correction is None else correction)
    return cast(_squeezed(variance, dims, keepdim).sqrt(), x.dtype)


def native_layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """aten.native_layer_norm: (result in x's dtype, mean, 1 / standard deviation), the latter two wide."""
    rank = x.dim()
    dims = list(range(rank - len(normalized_shape), rank))
    value = wide(x)
    variance, mean = moments(value, dims, 0)
    rstd = (variance + eps).rsqrt()
    out = (value - mean) * rstd
    if weight is not None:
        out = out * wide(weight)
    if bias is not None:
        out = out + wide(bias)
    stored = value.dtype if x.device.type != "cpu" else x.dtype  # as aten's kernels do
    return cast(out, x.dtype), cast(mean, stored), cast(rstd, stored)


def native_layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """With n the normalised value and g = grad * weight: dx = rstd * (g - mean(g) - n * mean(g * n))."""
    axis = x.dim() - len(normalized_shape)
    inner, outer = list(range(axis, x.dim())), list(range(axis))
    wide_grad, normal = wide(grad), (wide(x) - wide(mean)) * wide(rstd)
    dx = dweight = dbias = None
    if mask[0]:
        scaled = wide_grad if weight is None else wide_grad * wide(weight)
        dx = cast(_normal_backward(scaled, normal, wide(rstd), inner), x.dtype)
    if mask[1] and weight is not None:
        dweight = cast(_summed(wide_grad * normal, outer), weight.dtype)
    if mask[2] and bias is not None:
        dbias = cast(_summed(wide_grad, outer), bias.dtype)
    return dx, dweight, dbias


def _normal_backward(grad: Tensor, normal: Tensor, rstd: Tensor, dims: list[int]) -> Tensor:
    centre = aten.mean.dim(grad, dims, True)
    along = aten.mean.dim(grad * normal, dims, True)
    return (grad - centre - normal * along) * rstd


def _summed(x: Tensor, dims: list[int]) -> Tensor:
    return aten.sum.dim_IntList(x, dims) if dims else x


DECOMPOSITIONS = {
    aten.var.correction: var,
    aten.var_mean.correction: var_mean,
    aten.std.correction: std,
    aten.native_layer_norm.default: native_layer_norm,
    aten.native_layer_norm_backward.default: native_layer_norm_backward,
}
