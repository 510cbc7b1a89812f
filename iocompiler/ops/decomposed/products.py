"""Products that are none for matrix units: of few terms, and of vectors.

A contraction is a library's call, apart from what stands around it, and made for large matrices;
these are kernels like any other, computed where they are read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from iocompiler.ops import target
from iocompiler.ops.decomposed.arithmetic import DECLINED, cast, wide

aten = torch.ops.aten

# of a product: its terms are read by every result
_MOST_TERMS = 4
# results of each pair of a batch that are sums of their own: each reads its operands again, if only
# from the cache
_MOST_RESULTS = 4


def few_terms(a: Tensor, b: Tensor) -> Tensor:
    """``a [..., M, K] @ b [..., K, N]`` elementwise: of one term anywhere (the angles of a rotary
    embedding), of some on a GPU (the factors of a butterfly).
    """
    if not _has_few_terms(a, b):
        return DECLINED
    left, right = (a, b) if statically_known_true(a.shape[-1] == 1) else (wide(a), wide(b))
    total = left[..., :1] * right[..., :1, :]
    for k in range(1, a.shape[-1]):
        total = total + left[..., k : k + 1] * right[..., k : k + 1, :]
    return cast(total, a.dtype).contiguous()


def pairs(a: Tensor, b: Tensor) -> Tensor:
    """As `few_terms`, and ``a [B, M, K] @ b [B, K, N]`` as sums on a GPU, where one of the two is a
    vector (a state of linear attention, read by its query) or both are nearly.
    """
    if _has_few_terms(a, b):
        return few_terms(a, b)
    if not _is_generated(a, b) or statically_known_true(a.shape[0] == 1):
        return DECLINED
    results = [n if isinstance(n, int) else math.inf for n in (a.shape[1], b.shape[2])]
    if 1 not in results and math.prod(results) > _MOST_RESULTS:
        return DECLINED
    left, right = wide(a).unsqueeze(-1), wide(b).unsqueeze(-3)
    return cast((left * right).sum(-2), a.dtype).contiguous()


def _has_few_terms(a: Tensor, b: Tensor) -> bool:
    terms = a.shape[-1]
    if statically_known_true(terms == 1):
        return _is_dense(a, b)
    return isinstance(terms, int) and 1 < terms <= _MOST_TERMS and _is_generated(a, b)


def _is_dense(a: Tensor, b: Tensor) -> bool:
    return a.layout == b.layout == torch.strided


def _is_generated(a: Tensor, b: Tensor) -> bool:
    on_gpu = target.device_type(a) == "cuda"
    return on_gpu and _is_dense(a, b) and a.is_floating_point()


DECOMPOSITIONS = {aten.mm.default: few_terms, aten.bmm.default: pairs}
