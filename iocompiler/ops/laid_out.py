"""A tensor laid out anew, whose gradient is laid out as the tensor was.

    iocompiler::laid_out(Tensor x, MemoryFormat memory_format) -> Tensor

A plain copy hands its gradient on in whatever order that came: a gradient of an input would leave
the graph in another order than eager's, and be copied once more where it is accumulated. It stands
in no flat graph: there it is a clone, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iocompiler.graph.storage_order import Order, lies_in, memory_format
from iocompiler.ops import library

LAID_OUT = library.define(
    "laid_out(Tensor x, MemoryFormat memory_format) -> Tensor", torch.Tag.pt2_compliant_tag
)


def laid_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``x``, of rank 4 or 5, in new memory, in this order."""
    return x.clone(memory_format=memory_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (x, _) = inputs
    orders = [order for order in Order if lies_in(x, order)]
    ctx.before = memory_format(orders[0], x.dim()) if orders else None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad if ctx.before is None else LAID_OUT(grad, ctx.before), None


library.implement("laid_out", laid_out, laid_out)
library.differentiate("laid_out", _backward, _setup)
DECOMPOSITIONS = {LAID_OUT: laid_out}
