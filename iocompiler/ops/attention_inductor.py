"""Attention in a graph that Inductor compiles for the CPU: the library's kernel as the operator it
is, so that what stands around it is fused, and no call goes through Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iocompiler.ops import attention_kernels as kernels
from iocompiler.ops.attention import BACKWARD, FORWARD, arranged, lse_dtype
from iocompiler.ops.library import function


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    causal: bool,
    dropout_p: float,
    kernel: str,
    layout: str,
) -> Any:
    if kernel != "cpu" or not query.numel() or not key.numel():
        return NotImplemented
    setting = kernels.Setting(scale, causal, dropout_p)
    out, lse, rows = kernels.cpu_library(query, key, value, bias, setting)
    out = kernels.with_nan(out, rows, query)
    none = (query.new_empty((0,), dtype=torch.int64) for _ in range(2))
    lse = lse.to(lse_dtype(query)).contiguous()
    return arranged(out, out.shape, layout[3]), lse, *none


def _backward(grad: Tensor, query: Tensor, key: Tensor, *rest: Any) -> Any:
    kernel, bias_grad = rest[-3], rest[-1]
    # the library has no gradient of its mask
    if kernel != "cpu" or bias_grad or not query.numel() or not key.numel():
        return NotImplemented
    return function("attention_backward")(grad, query, key, *rest)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {FORWARD: _forward, BACKWARD: _backward}
"""For Inductor's table; where a call is none of the library's kernel, it stays as it is."""
