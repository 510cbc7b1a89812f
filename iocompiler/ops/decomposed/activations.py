"""Softmax and GELU spelled so that a GPU does little arithmetic an element."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iocompiler.ops.decomposed.arithmetic import cast, wide

aten = torch.ops.aten


def softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """aten._softmax: one division a row, not one an element. The sum is at least one, so its
    reciprocal neither overflows nor vanishes.
    """
    result = torch.float32 if half_to_float else x.dtype
    x = wide(x).contiguous()  # as eager lays out its result
    if x.numel() == 0:
        return cast(x.exp(), result)
    powers = (x - x.amax(dim, keepdim=True)).exp()
    return cast(powers * powers.sum(dim, keepdim=True).reciprocal(), result)


def gelu_backward(grad: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    """aten.gelu_backward: grad * (Phi(x) + x phi(x)), or the derivative of its tanh form."""
    dtype = x.dtype
    grad, x = wide(grad), wide(x)
    if approximate == "tanh":
        slope = _tanh_slope(x)
    else:
        density = torch.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
        slope = aten.special_ndtr.default(x) + x * density
    return cast(grad * slope, dtype)


def _tanh_slope(x: Tensor) -> Tensor:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    bend = torch.tanh(scale * (x + cubic * square * x))
    inner = scale * (1 + 3 * cubic * square)
    return 0.5 * (1 + bend) + 0.5 * x * (1 - bend * bend) * inner


DECOMPOSITIONS = {
    aten._softmax.default: softmax,
    aten.gelu_backward.default: gelu_backward,
}
