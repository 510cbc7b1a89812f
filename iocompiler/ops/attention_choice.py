"""Which library kernel runs an attention, decided once, when the graph is rewritten, and written on
the node.

The order is the measured one on Hopper: cuDNN, then FlashAttention, then the memory-efficient
kernel (the only one with a bias, with float32, and causal with unequal lengths), then blockwise
aten, which takes everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iocompiler.graph.sizes import equal, known
from iocompiler.ops import target

KERNELS = ("cudnn", "flash", "efficient", "cpu", "blockwise")
MEMORY = {"h": (0, 1, 2, 3), "s": (0, 2, 1, 3), "t": (2, 0, 1, 3)}
"""Memory orders of a [B, H, S, D] tensor, outermost dim first: heads apart, [B, S, H, D] of a split
projection, [S, B, H, D] of one whose batch does not come first."""
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """``kernel``, one of `KERNELS`; ``layout``: a letter of `MEMORY` for query, key, value and
    output in turn."""

    kernel: str
    layout: str


def choose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    causal: bool,
    dropout_p: float,
) -> Choice:
    """The kernel for these (fake) tensors, as `iocompiler::attention_forward` takes them."""
    kernel = _kernel(query, key, value, bias, causal, dropout_p)
    orders = order(query, key, value)
    if kernel in ("efficient", "blockwise"):
        return Choice(kernel, "ssss")  # that is how they allocate
    return Choice(kernel, orders + orders[0])


def order(*tensors: Tensor) -> str:
    """The letters of `MEMORY` that say how tensors [B, H, S, D] lie."""
    return "".join(_order(x) for x in tensors)


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, dropout_p: float
) -> str:
    if target.device_type(q) == "cpu":
        # its kernel takes a mask of the inputs' dtype only
        plain = q.dtype in (torch.float32, torch.float64, *_HALF) and (
            bias is None or bias.dtype == q.dtype
        )
        same = plain and dropout_p == 0.0 and equal(q.shape[3], v.shape[3])
        return "cpu" if same else "blockwise"
    if target.device_type(q) != "cuda" or dropout_p >= 1.0:
        return "blockwise"
    capability = target.capability(q)
    same_head = equal(q.shape[3], v.shape[3])
    square = not causal or equal(q.shape[2], k.shape[2])
    half = q.dtype in _HALF and capability >= (8, 0)
    if half and bias is None and same_head and square and q.shape[3] <= 256:
        if capability >= target.HOPPER and _cudnn_takes(q, k, dropout_p):
            return "cudnn"
        if torch.backends.cuda.flash_sdp_enabled():  # type: ignore[no-untyped-call]
            return "flash"
    enabled = torch.backends.cuda.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]
    if (
        q.dtype in (torch.float32, *_HALF)
        and enabled
        and _efficient_takes(q)
        and _efficient_takes(v)
    ):
        return "efficient"
    return "blockwise"


def _efficient_takes(x: Tensor) -> bool:
    # with other widths its backward reads past the end of a head (seen on an H200, torch 2.11)
    return known(x.shape[3] * x.element_size() % 16 == 0)


def _cudnn_takes(q: Tensor, k: Tensor, dropout_p: float) -> bool:
    if not torch.backends.cuda.cudnn_sdp_enabled() or torch.are_deterministic_algorithms_enabled():  # type: ignore[no-untyped-call]
        return False
    if not known(q.shape[3] % 8 == 0) or q.shape[3] > 128:
        return False
    if not known(q.shape[2] > 1) or not known(k.shape[2] > 1):
        return False
    # its dropout wants whole tiles
    return dropout_p == 0.0 or (known(q.shape[2] % 64 == 0) and known(k.shape[2] % 64 == 0))


def _order(x: Tensor) -> str:
    if known(x.stride(2) < x.stride(1)) and not known(x.shape[1] == 1):
        return "h"
    outermost = known(x.stride(0) < x.stride(2)) and not known(x.shape[0] == 1)
    return "t" if outermost else "s"
