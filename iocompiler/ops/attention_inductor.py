"""Attention in a graph that Inductor compiles for the CPU: the library's kernel as the operator it
is, so that what stands around it is fused, and no call goes through Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

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
    setting = kernels.Setting(scale, causal, dropout_p)
    out, lse, rows = kernels.cpu_library(query, key, value, bias, setting)
    out = kernels.with_nan(out, rows, query)
    none = (query.new_empty((0,), dtype=torch.int64) for _ in range(2))
    lse = lse.to(lse_dtype(query)).contiguous()
    return arranged(out, out.shape, layout[3]), lse, *none


def decompositions(gm: GraphModule) -> dict[Any, Callable[..., Any]]:
    """For Inductor's table: it takes no operator that is decomposed here and called there, so all
    attentions of the graph run by the library's kernel, or nothing is decomposed.
    """
    graphs = [each.graph for each in gm.modules() if isinstance(each, GraphModule)]
    calls = [n for graph in graphs for n in graph.find_nodes(op="call_function", target=FORWARD)]
    if not calls or not all(map(_by_library, calls)):
        return {}
    return {FORWARD: _forward, BACKWARD: function("attention_backward")}


def _by_library(call: Node) -> bool:
    query, key, kernel = call.args[0], call.args[1], call.args[7]
    empty = any(0 in x.meta["val"].shape for x in (query, key) if isinstance(x, Node))
    return kernel == "cpu" and not empty
