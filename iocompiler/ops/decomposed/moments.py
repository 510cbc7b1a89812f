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

    All are corrected for what rounding the mean left, in the pass that sums the squares: with
    deviations d, ``sum(d^2) - sum(d)^2 / n`` (Chan, Golub, LeVeque 1983) and ``mean + sum(d) / n``.
    Equal elements, whose computed mean may be off by a rounding, then deviate by 0, as by Welford's
    method; a norm would multiply that rounding by 1 / sqrt(eps).

    A single element deviates by nothing, which a multiply-add of an x that is a product itself
    would not leave of ``x - x``: a variance of 0 / 0 would be infinite.
    """
    size = count(x, dims)
    if isinstance(size, int) and size == 1:
        nothing = (x * 0).abs()  # or NaN
        return nothing / _degrees(size, correction), x, nothing
    mean = aten.mean.dim(x, dims, True)
    deviation = x - mean
    squares = aten.sum.dim_IntList(deviation * deviation, dims, True)
    rest = aten.sum.dim_IntList(deviation, dims, True)
    left = rest / size
    total = (squares - rest * left).clamp_min(0)
    return total / _degrees(size, correction), mean + left, deviation - left


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
    found = moments(wide(x), dims, 1 if correction is None else correction)[:2]
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
    variance, _, _ = moments(wide(x), dims, 1 if correction is None else correction)
    return cast(_squeezed(variance, dims, keepdim).sqrt(), x.dtype)


DECOMPOSITIONS = {
    aten.var.correction: var,
    aten.var_mean.correction: var_mean,
    aten.std.correction: std,
}
