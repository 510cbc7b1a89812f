"""Products of matrices that are added up, with one sum.

    iocompiler::sum_of_products(Tensor[] lefts, Tensor[] rights) -> Tensor
    result[m, n] = sum_i sum_k lefts[i][m, k] rights[i][k, n]

The gradient of what several linear layers read is one. The library adds each product to those
before it where it stores it, in place: the sum passes through memory once for each, and no kernel
adds. The matmul template has one accumulator for all (`plan/factors.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from iocompiler.ops import library
from iocompiler.ops.multiply import multiply

SUM_OF_PRODUCTS = library.define(
    "sum_of_products(Tensor[] lefts, Tensor[] rights) -> Tensor", torch.Tag.pt2_compliant_tag
)


def _sum_of_products(lefts: list[Tensor], rights: list[Tensor]) -> Tensor:
    """lefts [M, K_i], rights [K_i, N] of one dtype; the result [M, N] is contiguous. It is rounded
    to the dtype once a product, which adding rounded products does twice.
    """
    total = _result(lefts, rights)
    for place, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        multiply(left, right, total, add=place > 0)
    return total


def _result(lefts: list[Tensor], rights: list[Tensor]) -> Tensor:
    return lefts[0].new_empty((lefts[0].shape[0], rights[0].shape[1]))


library.implement("sum_of_products", _sum_of_products, _result, multiplies=True)
