"""A product in half precision, stored in float32 as it was summed.

    iocompiler::wide_product(Tensor a, Tensor b) -> Tensor
    result[.., m, n] = sum_k a[.., m, k] b[.., k, n]

The gradient of a float32 weight that autocast multiplied in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iocompiler.ops import library

WIDE_PRODUCT = library.define(
    "wide_product(Tensor a, Tensor b) -> Tensor", torch.Tag.pt2_compliant_tag
)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a [.., M, K], b [.., K, N], two or three dims of float16 or bfloat16; [.., M, N] in float32,
    contiguous. Never rounded to the operands' dtype.
    """
    if a.device.type != "cuda":
        return a.float() @ b.float()
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    return multiply(a, b, out_dtype=torch.float32)


def _wide_product_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=torch.float32)


library.implement("wide_product", wide_product, _wide_product_fake)
