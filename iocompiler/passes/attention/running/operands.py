"""Query, key, value and output of an attention, between the graph and the semantic ops."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.arrange import Arranger
from iocompiler.passes.attention.dims.axes import Dims
from iocompiler.passes.attention.dims.views import Operand
from iocompiler.passes.attention.reading.description import Attention, Declined, Inverse, Scale
from iocompiler.passes.attention.reading.frame import Frame
from iocompiler.passes.attention.reading.results import is_differentiated
from iocompiler.passes.attention.running import strides

aten = torch.ops.aten
_COPIES = (aten.clone.default, aten.contiguous.default)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_dtypes(found: Attention) -> None:
    """Raise `Declined` where no kernel computes in these dtypes."""
    if found.dtype not in _DTYPES:
        raise Declined(f"the output is {found.dtype}")
    for operand in (found.query, found.key, found.value):
        if not views.dtype(operand.node).is_floating_point:
            raise Declined(f"{operand.node.name} is {views.dtype(operand.node)}")


def operands(arranger: Arranger, found: Attention, frame: Frame) -> tuple[Node, Node, Node]:
    """Query, key and value as the semantic ops take them."""
    as_found = is_differentiated(found.anchor)
    query, key, value = (
        cast(arranger, arranger.operand(_narrowed(operand, found.dtype), target), found.dtype)
        for operand, target in (
            (found.query, frame.query),
            (found.key if as_found else _handed_out(found.key), frame.key),
            (found.value if as_found else _handed_out(found.value), frame.value),
        )
    )
    return query, key, value


def multiplied(
    arranger: Arranger, query: Node, factors: tuple[Scale, ...], frame: Frame, dtype: torch.dtype
) -> Node:
    """The query times (or divided by) what the scores are."""
    for factor in factors:
        inverse = isinstance(factor.factor, Inverse)
        by = factor.factor.of if inverse else factor.factor
        if factor.dims:  # [B, H, S, 1] of the scores, as of the query
            by = arranger.arranged(by, factor.dims, frame.scores, widen=False)
        else:
            by = _single(arranger, by)
        query = arranger.call(aten.div.Tensor if inverse else aten.mul.Tensor, query, by)
        query = cast(arranger, query, dtype)
    return query


def finish(
    gm: GraphModule, found: Attention, arranger: Arranger, out: Node, anchor: Node, dims: Dims
) -> None:
    """Let the output [B, H, S, E] stand where it was computed, and erase what it stands for."""
    out = arranger.arranged(out, Frame(found).out, dims)
    out = cast(arranger, out, views.dtype(anchor))
    strides.note(out, view.value(anchor))
    edit.redirect(gm, anchor, out)
    for node in reversed(list(gm.graph.nodes)):
        if node in found.interior:
            edit.erase(gm, node)  # a dropout is never erased for being unread alone


def _handed_out(operand: Operand) -> Operand:
    """The copy that the caller gets (a cache of keys): what that is a copy of need not be stored
    beside it.
    """
    for place, (node, _) in enumerate(operand.stages[:-1]):
        returned = any(user.op == "output" for user in node.users)
        if returned and node.target in _COPIES and not view.is_shared(node):
            return Operand(operand.stages[: place + 1])
    return operand


def _narrowed(operand: Operand, dtype: torch.dtype) -> Operand:
    """Without a widening cast of what already has the output's dtype: the kernels accumulate in
    float32 anyway.
    """
    node, dims = operand.stages[-1]
    if views.dtype(node) == dtype or node.target is not aten.to.dtype:
        return operand
    source: Any = node.args[0]
    if views.dtype(source) != dtype or dtype not in (torch.float16, torch.bfloat16):
        return operand
    return Operand((*operand.stages, *views.stages(source, dims)))


def cast(arranger: Arranger, node: Node, dtype: torch.dtype) -> Node:
    return node if views.dtype(node) == dtype else arranger.call(aten.to.dtype, node, dtype)


def _single(arranger: Arranger, factor: Any) -> Any:
    """A tensor of one element without dims, so that it widens nothing."""
    if views.is_tensor(factor) and len(views.shape(factor)):
        return arranger.call(aten.reshape.default, factor, [])
    return factor
