"""In which order a chain of matrix products takes the least time.

    time(i..j) = min over s of time(i..s) + time(s+1..j) + time(one product of the two)

(Godbole 1973, for FLOPs; here it is the roofline's time, bytes counted.) What a gradient adds are
two products for each, of the same three matrices: the order that is best stays best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from iocompiler.cost_model.cost import Contraction, Cost
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.roofline import time

Order: TypeAlias = "int | tuple[Order, Order]"
"""A matrix of the chain by its place, or a product of two of these."""
Shape: TypeAlias = tuple[int, ...]
"""Of one matrix, or of several of the same size, their number before it."""

_ALIGNED_BYTES = 16


@dataclass
class ProductOrders:
    """The orders of one chain.

    Args:
        shapes: of its matrices, each two dimensions or more.
        tf32: as for `roofline.time`.
    """

    shapes: Sequence[Shape]
    dtype: torch.dtype
    device: Device
    tf32: bool = False
    _best: dict[tuple[int, int], tuple[float, Order]] = field(default_factory=dict)

    def cheapest(self) -> Order:
        """The order of the least time; of equals, the one that begins at the left."""
        return self._between(0, len(self.shapes) - 1)[1]

    def seconds(self, order: Order) -> float:
        """What all products take in this order."""
        if isinstance(order, int):
            return 0.0
        first, second = order
        made = self._product(self._shape(first), self._shape(second))
        return self.seconds(first) + self.seconds(second) + made

    def smallest(self, order: Order) -> Order:
        """Of the products of this order, the one whose result is smallest."""
        if isinstance(order, int):
            return order
        inner = [self.smallest(each) for each in order if not isinstance(each, int)]
        return min((*inner, order), key=lambda each: math.prod(self._shape(each)))

    def _between(self, first: int, last: int) -> tuple[float, Order]:
        if first == last:
            return 0.0, first
        if (first, last) not in self._best:
            ways = [self._split(first, at, last) for at in reversed(range(first, last))]
            self._best[first, last] = min(ways, key=lambda way: way[0])
        return self._best[first, last]

    def _split(self, first: int, at: int, last: int) -> tuple[float, Order]:
        left, right = self._between(first, at), self._between(at + 1, last)
        made = self._product(self._shape(left[1]), self._shape(right[1]))
        return left[0] + right[0] + made, (left[1], right[1])

    def _shape(self, order: Order) -> Shape:
        if isinstance(order, int):
            return tuple(self.shapes[order])
        return _multiplied(self._shape(order[0]), self._shape(order[1]))

    def _product(self, left: Shape, right: Shape) -> float:
        """Seconds of one product; matrices times one matrix are rows of one product."""
        made = _multiplied(left, right)
        batch, rows = math.prod(made[:-2]), made[-2]
        if len(right) == 2:
            batch, rows = 1, batch * rows
        columns, depth, size = made[-1], left[-1], self.dtype.itemsize
        aligned = not any(n * size % _ALIGNED_BYTES for n in (columns, depth))
        product = Contraction(batch, rows, columns, depth, self.dtype, aligned)
        read = (math.prod(left) + math.prod(right)) * size
        cost = Cost(read, math.prod(made) * size, product.flops, contractions=(product,))
        return time(cost, self.device, self.dtype, tf32=self.tf32)


def _multiplied(left: Shape, right: Shape) -> Shape:
    outside = torch.broadcast_shapes(left[:-2], right[:-2])  # type: ignore[no-untyped-call]
    return (*outside, left[-2], right[-1])
