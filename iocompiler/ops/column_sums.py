"""Sums down the columns of the gradients of query, key and value, line by line: what is left of the
gradient of a projection's bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ColumnSums(NamedTuple):
    """Memory for them.

    Attributes:
        parts: of query, key and value [B, H, S, D] each, [B, H, lines, D], any strides; float32.
        rows: that make a line; the last one may have fewer.
    """

    parts: Sequence[Tensor]
    rows: int

    def take(self, gradients: Sequence[Tensor]) -> None:
        """Write the sums of these, all in the first line."""
        for part, gradient in zip(self.parts, gradients, strict=True):
            part.zero_()
            if part.shape[2]:
                torch.sum(gradient, 2, keepdim=True, dtype=part.dtype, out=part[:, :, :1])


def lines(shape: Sequence[Any], rows: int) -> tuple[Any, ...]:
    """The shape of the sums of a tensor of this one, [B, H, S, D]."""
    batch, heads, length, width = shape
    return batch, heads, -(-length // rows), width
