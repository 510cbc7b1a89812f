"""A product that a bias and a matrix are added to.

    iocompiler::biased_addmm(Tensor added, Tensor bias, Tensor a, Tensor b) -> Tensor
    result[m, n] = sum_k a[m, k] b[k, n] + bias[n] + added[m, n]

A linear layer and what goes around it. The planner makes it (`plan/residual.py`) of products that
the library is asked for by addresses, which adds both where it stores the product; what stands here
is for where that is not so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iocompiler.ops import library

BIASED_ADDMM = library.define(
    "biased_addmm(Tensor added, Tensor bias, Tensor a, Tensor b) -> Tensor",
    torch.Tag.pt2_compliant_tag,
)


def biased_addmm(added: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """added [.., M, N], bias [N] or more, a [.., M, K], b [.., K, N] of one dtype; the result
    [.., M, N] is contiguous. The sum is float32's, rounded once.
    """
    return (a.float() @ b.float() + bias + added).to(a.dtype)


def _biased_addmm_fake(added: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


library.implement("biased_addmm", biased_addmm, _biased_addmm_fake)
