"""The two orders in which a library's convolutions take an image: channels before places, or after
them; and which of them a tensor lies in. Nothing here adds a guard on a size.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

RANKS = (4, 5)
"""Images and volumes: [batch, channels, places ...], and weights [out, in, places ...]."""


class Order(Enum):
    """Where the channels of [batch, channels, places ...] lie in memory."""

    FIRST = "contiguous"
    LAST = "channels last"


def memory_format(order: Order, rank: int) -> torch.memory_format:
    """Torch's name of an order; `KeyError` where a rank has no channels last."""
    if order is Order.FIRST:
        return torch.contiguous_format
    return {4: torch.channels_last, 5: torch.channels_last_3d}[rank]


def order_of(tensor: Tensor) -> Order | None:
    """The order whose strides the tensor has, each of them exactly, as eager would make it anew;
    None where it has neither.
    """
    return next((order for order in Order if _lies(tensor, order, exact=True)), None)


def lies_in(tensor: Tensor, order: Order) -> bool:
    """Whether it can be read as being in this order: strides of extents of one do not count."""
    return _lies(tensor, order, exact=False)


def is_movable(tensor: Any) -> bool:
    """Whether it is a plain tensor of floats that has two orders."""
    if not isinstance(tensor, Tensor):
        return False
    plain: bool = not is_traceable_wrapper_subclass(tensor)
    return (
        plain
        and tensor.layout is torch.strided
        and tensor.dim() in RANKS
        and tensor.is_floating_point()
    )


def is_both(tensor: Tensor) -> bool:
    """Whether both orders are one: a single channel, or a single place."""
    return all(lies_in(tensor, order) for order in Order)


def _lies(tensor: Tensor, order: Order, exact: bool) -> bool:
    if order is Order.LAST and tensor.dim() not in RANKS:
        return False
    expected = _strides(tensor.shape, order)
    return all(
        statically_known_true(stride == wanted) or (not exact and statically_known_true(size == 1))
        for size, stride, wanted in zip(tensor.shape, tensor.stride(), expected, strict=True)
    )


def _strides(shape: Sequence[Any], order: Order) -> list[Any]:
    """Of a tensor made anew: dimensions from the last to the first, or the channels before all."""
    inwards = [*range(len(shape) - 1, -1, -1)]
    if order is Order.LAST:
        inwards.insert(0, inwards.pop(-2))
    strides: list[Any] = [1] * len(shape)
    step: Any = 1
    for dim in inwards:
        strides[dim] = step
        step = step * (max(shape[dim], 1) if isinstance(shape[dim], int) else shape[dim])
    return strides
