"""A linear head in chunks of rows: its logits, and what their gradients come to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iocompiler.ops.linear_cross_entropy_products import (
    add_outer,
    filled,
    is_aligned,
    is_unlike_products,
    project,
    wide,
    with_zeros,
)
from iocompiler.ops.multiply import multiply
from iocompiler.ops.target import on_gpu


class Head:
    """The rows [T, D], the weight [V, D] and the bias [V], and the gradients that are ``needed`` of
    the three.

    On a GPU the extents of a product in half precision must be aligned (see `aligned_mm.py` for
    why): an odd vocabulary is filled up with zeros, once. A product over it in two parts would
    round in between, and what the second adds to a first that is nearly a row of the weight would
    be lost in every row.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]
    ) -> None:
        self._x, self._weight, self._bias = x.contiguous(), weight, bias
        self._vocabulary = weight.shape[0]
        columns = _columns(weight.shape[0], weight)
        if columns != weight.shape[0]:
            self._weight = with_zeros(weight, columns)
            self._bias = None if bias is None else with_zeros(bias, columns)
        of_x, of_weight, of_bias = needed
        shape, dtype = tuple(self._weight.shape), accumulated(weight.dtype)
        # the weight's is written whole by the first chunk there is
        new = self._weight.new_empty if x.shape[0] else self._weight.new_zeros
        self._dx = x.new_empty(x.shape) if of_x else None
        self._dweight = new(shape, dtype=dtype) if of_weight else None
        self._dbias = x.new_zeros(shape[:1], dtype=wide(x)) if of_bias else None

    def project(self, some: slice, logits: Tensor) -> None:
        """Write the logits of ``some`` rows, [rows, V or what that is filled up to]."""
        project(self._x[some], self._weight, self._bias, logits)

    def take(self, some: slice, d: Tensor) -> None:
        """Add what the gradient of these logits comes to; chunks come in order, the first first."""
        if self._dx is not None:
            multiply(d, self._weight, self._dx[some])
        if self._dweight is not None:
            add_outer(d, self._x[some], self._dweight, first=not some.start)
        if self._dbias is not None:
            self._dbias += d.sum(0, dtype=wide(self._x))

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of x, weight and bias, where they are needed."""
        dweight, dbias = (
            d if d is None else d[: self._vocabulary] for d in (self._dweight, self._dbias)
        )
        return self._dx, dweight, dbias


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype the weight's gradient is summed in: unscaled sums may leave float16's range."""
    return torch.float32 if dtype == torch.float16 else dtype


def scratch(x: Tensor, vocabulary: int, rows: int) -> Tensor:
    """[rows, columns] in x's dtype: room for a product, each row where the row kernel reads it."""
    columns = _columns(vocabulary, x)
    aligned = not on_gpu(x) or is_aligned(columns, x.element_size())
    row = columns if aligned else filled(columns)
    return x.new_empty((rows, row))[:, :columns]


def _columns(vocabulary: int, x: Tensor) -> int:
    """Classes, with those that are filled up."""
    odd = is_unlike_products(vocabulary, x.element_size())
    return filled(vocabulary) if odd and on_gpu(x) else vocabulary
