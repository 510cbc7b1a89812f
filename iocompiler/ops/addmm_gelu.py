"""The GELU of a product, and the product, which a backward reads.

    iocompiler::addmm_gelu(Tensor? bias, Tensor a, Tensor b) -> (Tensor, Tensor)
    product[m, n] = bias[n] + sum_k a[m, k] b[k, n], activation = GELU of it, as tanh has it

By addresses both are one launch of the library (`plan/activation.py`), whose epilogue computes the
activation of what is not rounded yet. Here it is two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.ops import library

ADDMM_GELU = library.define(
    "addmm_gelu(Tensor? bias, Tensor a, Tensor b) -> (Tensor, Tensor)", torch.Tag.pt2_compliant_tag
)


def _addmm_gelu(bias: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a [M, K], b [K, N], bias [N], of one dtype; both results [M, N] are contiguous: activation,
    product.
    """
    product = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    return F.gelu(product, approximate="tanh"), product


def _addmm_gelu_fake(bias: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shape = (a.shape[0], b.shape[1])
    return a.new_empty(shape), a.new_empty(shape)


library.implement("addmm_gelu", _addmm_gelu, _addmm_gelu_fake)
