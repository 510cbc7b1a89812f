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
    terms = a.shape[-1]
    if not _is_dense(a, b):
        return DECLINED
    if statically_known_true(terms == 1):
        return (a * b).contiguous()
    if not _is_generated(a) or not isinstance(terms, int) or not 1 < terms <= _MOST_TERMS:
        return DECLINED
    left, right = wide(a), wide(b)
    total = left[..., :1] * right[..., :1, :]
    for k in range(1, terms):
        total = total + left[..., k : k + 1] * right[..., k : k + 1, :]
    return cast(total, a.dtype).contiguous()


def pairs(a: Tensor, b: Tensor) -> Tensor:
    """As `few_terms`, and ``a [B, M, K] @ b [B, K, N]`` as sums on a GPU, where one of the two is a
    vector (a state of linear attention, read by its query) or both are nearly.
    """
    found = few_terms(a, b)
    if found is not DECLINED:
        return found
    many, rows, columns = a.shape[0], a.shape[1], b.shape[2]
    results = [math.inf if not isinstance(n, int) else n for n in (rows, columns)]
    if not _is_dense(a, b) or not _is_generated(a) or statically_known_true(many == 1):
        return DECLINED
    if 1 not in results and not math.prod(results) <= _MOST_RESULTS:
        return DECLINED
    left, right = wide(a).unsqueeze(-1), wide(b).unsqueeze(-3)
    return cast((left * right).sum(-2), a.dtype).contiguous()


def _is_dense(a: Tensor, b: Tensor) -> bool:
    return a.layout == b.layout == torch.strided


def _is_generated(x: Tensor) -> bool:
    return x.is_floating_point() and target.device_type(x) == "cuda"


DECOMPOSITIONS = {aten.mm.default: few_terms, aten.bmm.default: pairs}
