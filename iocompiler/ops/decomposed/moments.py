"""Variance and standard deviation.

The variance is always two-pass, ``sum((x - mean)^2) / (n - correction)``: ``E[x^2] - E[x]^2`` loses
every digit where the mean is large against the deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iocompiler.ops.decomposed.arithmetic import DECLINED, cast, count, positive, wide

aten = torch.ops.aten


def moments(x: Tensor, dims: Sequence[int], correction: float) -> tuple[Tensor, Tensor, Tensor]:
    """Variance and mean of ``x`` (already wide) over ``dims``, kept as dimensions of size one, and
    ``x`` less its mean.
    """
    size = count(x, dims)
    mean = aten.mean.dim(x, dims, True)
    deviation = x - mean
    total = aten.sum.dim_IntList(deviation * deviation, dims, True)
    return total / _degrees(size, correction), mean, deviation


def _variance(x: Tensor, dims: Sequence[int], correction: float) -> tuple[Tensor, Tensor]:
    """Variance and mean, corrected for what rounding the mean left: ``sum(d^2) - sum(d)^2 / n``
    over the deviations d (Chan, Golub, LeVeque 1983). Equal elements, whose computed mean
    may be off by a rounding, then have the deviation 0, as by Welford's method.
    """
    size = count(x, dims)
    mean = aten.mean.dim(x, dims, True)
    deviation = x - mean
    squares = aten.sum.dim_IntList(deviation * deviation, dims, True)
    rest = aten.sum.dim_IntList(deviation, dims, True)
    total = (squares - rest * (rest / size)).clamp_min(0)
    return total / _degrees(size, correction), mean


def _degrees(size: Any, correction: float) -> Any:
    free = size - (int(correction) if float(correction).is_integer() else correction)
    if isinstance(free, (int, float)):
        return max(free, 0)
    return torch.sym_max(free, 0)  # type: ignore[no-untyped-call]


def _squeezed(x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    return x if keepdim else x.squeeze(list(dims))


def var_mean(
    x: Tensor,
    dim: Sequence[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> tuple[Tensor, Tensor]:
    """aten.var_mean.correction; both results in x's dtype."""
    if x.is_complex():
        return DECLINED
    dims = positive(dim, x.dim())
    found = _variance(wide(x), dims, 1 if correction is None else correction)
    variance, mean = (cast(_squeezed(f, dims, keepdim), x.dtype) for f in found)
    return variance, mean


def var(
    x: Tensor,
    dim: Sequence[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Tensor:
    """aten.var.correction."""
    if x.is_complex():
        return DECLINED
    return var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def std(
    x: Tensor,
    dim: Sequence[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Tensor:
    """aten.std.correction: the root is taken before rounding."""
    if x.is_complex():
        return DECLINED
    dims = positive(dim, x.dim())
    variance, _ = _variance(wide(x), dims, 1 if correction is None else correction)
    return cast(_squeezed(variance, dims, keepdim).sqrt(), x.dtype)


DECOMPOSITIONS = {
    aten.var.correction: var,
    aten.var_mean.correction: var_mean,
    aten.std.correction: std,
}
