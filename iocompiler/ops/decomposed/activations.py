"""Softmax spelled so that a GPU does little arithmetic an element."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from iocompiler.ops.decomposed.arithmetic import cast, wide

aten = torch.ops.aten


def softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """aten._softmax: one division a row, not one an element. The sum is at least one, so its
    reciprocal neither overflows nor vanishes.
    """
    result = torch.float32 if half_to_float else x.dtype
    x = wide(x).contiguous()  # as eager lays out its result
    if x.dim() and guard_or_false(x.shape[dim] == 0):  # rows that only a run counts are not asked
        return cast(x.exp(), result)
    powers = (x - x.amax(dim, keepdim=True)).exp()
    return cast(powers * powers.sum(dim, keepdim=True).reciprocal(), result)


DECOMPOSITIONS = {
    aten._softmax.default: softmax,
}
