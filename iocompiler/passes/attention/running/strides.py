"""The strides that the caller of the graph sees: those it would have seen without the rewrite."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.graph.sizes import known

aten = torch.ops.aten
_WANTED = "attention_strides"


def keep(gm: GraphModule) -> None:
    """Compute again the values of what reads an attention, and restore the strides of the outputs.

    Before: ``return (o,)`` with ``o`` in [B, S, H, D] memory order where the user's was [B, H, S,
        D].
    After: ``return (aten.contiguous.default(o),)``. What stays inside of the graph is not copied.
    """
    changed: set[Node] = set()
    output = gm.graph.output_node()
    for node in list(gm.graph.nodes):
        if _WANTED in node.meta:
            changed.add(node)
        elif changed.intersection(node.all_input_nodes) and _is_plain(node):
            wanted = view.value(node)
            if node.target is aten.view.default:  # of strides that may be no view any more
                edit.respell(node, aten.reshape.default, node.args)
            edit.compute_value(node)
            if _differs(view.value(node), wanted):
                changed.add(node)
                note(node, wanted)
    for node in changed:
        wanted = node.meta.pop(_WANTED)
        if output in node.users and _differs(view.value(node), wanted):
            _restore(gm, node, wanted, output)


def note(node: Node, wanted: Any) -> None:
    """Say that what ``node`` stands for was laid out as ``wanted``."""
    node.meta[_WANTED] = wanted


def _is_plain(node: Node) -> bool:
    return (
        node.op == "call_function"
        and not view.is_switch(node)
        and not view.mutates(node)
        and not view.finds_sizes(node)
    )


def _differs(new: Any, old: Any) -> bool:
    if not isinstance(new, torch.Tensor) or not isinstance(old, torch.Tensor):
        return True
    sizes = zip(new.shape, new.stride(), old.stride(), strict=True)
    return not all(known(a == b) or known(n <= 1) for n, a, b in sizes)


def _restore(gm: GraphModule, node: Node, wanted: torch.Tensor, output: Node) -> None:
    """Let the output be a copy of ``node`` in the memory order of ``wanted``."""
    order = sorted(range(wanted.dim()), key=lambda d: _rank(wanted, d))
    back = [order.index(d) for d in range(wanted.dim())]
    straight = order == sorted(order)
    new = node if straight else edit.call(gm, aten.permute.default, (node, order), {}, near=output)
    new = edit.call(gm, aten.contiguous.default, (new,), {}, near=output)
    if not straight:
        new = edit.call(gm, aten.permute.default, (new, back), {}, near=output)
    output.replace_input_with(node, new)


def _rank(tensor: torch.Tensor, dim: int) -> int:
    """How many dims lie outside of this one; dims of equal stride in their order."""
    stride = tensor.stride(dim)
    return sum(
        1
        for other in range(tensor.dim())
        if other != dim
        and (
            known(tensor.stride(other) > stride)
            or (known(tensor.stride(other) == stride) and other < dim)
        )
    )
