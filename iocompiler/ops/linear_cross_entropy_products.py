"""The products of linear + cross-entropy over the vocabulary, and which extents they like."""

from __future__ import annotations

import torch
from torch import Tensor

from iocompiler.ops.linear_cross_entropy_walk import ALIGNED, LINE
from iocompiler.ops.multiply import multiply

# Chunks are multiples of this many rows: of the library's smaller tiles.
ROWS = 128


def wide(x: Tensor) -> torch.dtype:
    """What losses are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def project(x: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    """Write x [rows, D] @ weight [N, D] transposed + bias [N] to ``logits`` [rows, N].

    A bias costs nothing where ``logits`` is contiguous; else aten writes it there first, and the
    product reads it back.
    """
    multiply(x, weight.t(), logits, bias=bias)


def add_outer(d: Tensor, x: Tensor, dweight: Tensor, *, first: bool) -> None:
    """Add d [rows, N] transposed @ x [rows, D] to ``dweight`` [N, D]; the ``first`` is written."""
    if dweight.dtype != x.dtype:
        dweight.copy_(d.t() @ x) if first else dweight.add_(d.t() @ x)
    else:
        multiply(d.t(), x, dweight, add=not first)


def with_zeros(x: Tensor, rows: int) -> Tensor:
    """``x`` with rows of zeros behind it. (`F.pad` writes everything twice.)"""
    found = x.new_empty((rows, *x.shape[1:]))
    found[: x.shape[0]].copy_(x)
    found[x.shape[0] :].zero_()
    return found


def is_aligned(vocabulary: int, itemsize: int) -> bool:
    """Whether rows of logits that follow each other begin where the row kernel reads them."""
    return vocabulary * itemsize % ALIGNED == 0


def is_unlike_products(vocabulary: int, itemsize: int) -> bool:
    """Whether a product over the vocabulary, on a GPU, would miss the library's fast kernels."""
    return itemsize == 2 and vocabulary >= LINE and not is_aligned(vocabulary, itemsize)


def filled(vocabulary: int) -> int:
    """The vocabulary, up to a multiple of `LINE`."""
    return -(-vocabulary // LINE) * LINE
