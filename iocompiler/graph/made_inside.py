"""What a checkpointed region is given and could make itself: masks, positions.

Masks are made once, before the layers. A layer that is checkpointed is a graph of its own, to which
its mask is a tensor like any other: nothing in it says that the mask is causal.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from iocompiler.graph import rewrite, view


def make_inside(gm: GraphModule) -> int:
    """Have regions make what depends on nothing but sizes, whole numbers and conditions.

    Before::

        mask = aten.le.Tensor(aten.arange.default(512), rows)
        y = tag_activation_checkpoint(layer, x, mask)

    After::

        y = tag_activation_checkpoint(layer, x)                       # where the mask is made

    What several regions make is equal, and made once again when they are one graph. Left outside:
    what is computed from other floats, is random, or has to do with a tensor that is written to.

    Returns:
        how many inputs are made inside.
    """
    found = view.checkpoints(gm)
    if not found:
        return 0
    outside = _Outside(gm)
    made = 0
    for call, inner in found:
        made += _inside(gm, call, inner, outside)
        make_inside(inner)
    return made


class _Outside:
    """What of a graph may be made again elsewhere."""

    def __init__(self, gm: GraphModule) -> None:
        self._regions = view.regions(gm)
        roots = view.roots(gm)
        targets = (t for node in gm.graph.nodes if not _detaches(node) for t in view.mutates(node))
        written = frozenset().union(*(roots[target] for target in targets))
        self._changing = {node for node, storages in roots.items() if storages & written}
        self._known: dict[Node, bool] = {}
        self._order = {node: place for place, node in enumerate(gm.graph.nodes)}

    def makes(self, node: Node, call: Node) -> list[Node] | None:
        """The calls that make a node, in their order, and what they begin with; None where it has
        to be given. ``call`` is the region that is to make it.
        """
        if node.op != "call_function" or not self._is_free(node):
            return None
        found, waiting = {node}, [node]
        while waiting:
            for read in waiting.pop().all_input_nodes:
                if read not in found:
                    found.add(read)
                    waiting.append(read)
        calls = [each for each in found if each.op == "call_function"]
        here = self._regions[call].autocast
        if any(self._regions[each].autocast != here for each in calls):
            return None
        return sorted(found, key=self._order.__getitem__)

    def _is_free(self, node: Node) -> bool:
        waiting = [node]
        while waiting:
            each = waiting[-1]
            reads = each.all_input_nodes
            later = [read for read in reads if read not in self._known]
            if later:
                waiting += later
                continue
            waiting.pop()
            self._known[each] = self._allows(each) and all(self._known[read] for read in reads)
        return self._known[node]

    def _allows(self, node: Node) -> bool:
        value = node.meta.get("val")
        if node in self._changing or not isinstance(value, (torch.Tensor, torch.SymInt, int)):
            return False
        if free_unbacked_symbols(value):
            return False  # a size that only a run finds
        if node.op == "placeholder":
            return not (isinstance(value, torch.Tensor) and _is_inexact(value))
        if node.op == "get_attr":
            return isinstance(value, torch.Tensor) and not value.requires_grad
        if node.op != "call_function" or view.is_random(node):
            return False
        if view.mutates(node) and not _detaches(node):
            return False
        if isinstance(node.target, torch._ops.OpOverload):
            return True
        return getattr(operator, getattr(node.target, "__name__", ""), None) is node.target


def _detaches(node: Node) -> bool:
    """What is made of a constant is detached in place, which writes nothing."""
    return node.target is torch.ops.aten.detach_.default


def _is_inexact(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _inside(gm: GraphModule, call: Node, inner: GraphModule, outside: _Outside) -> int:
    """Have one region make what it can; returns how many of its inputs that are."""
    body, *given = call.args
    inputs = dict(zip(inner.graph.find_nodes(op="placeholder"), given, strict=True))
    there = {node: inside for inside, node in inputs.items() if _begins(node)}
    more: list[Node] = []
    dropped: list[Node] = []
    for inside, argument in inputs.items():
        nodes = outside.makes(argument, call) if _is_read_tensor(inside, argument) else None
        if nodes is None:
            continue
        begins = [node for node in nodes if _begins(node) and node not in there]
        there |= {node: rewrite.add_input(inner, node) for node in begins}
        rewrite.copy_into(inner, [node for node in nodes if node not in there], there)
        rewrite.bypass(inner, inside, there[argument])
        inner.graph.erase_node(inside)
        more += begins
        dropped.append(inside)
    kept = [argument for inside, argument in inputs.items() if inside not in dropped]
    call.args = (body, *kept, *more)
    for inside in dropped:
        rewrite.erase(gm, inputs[inside])
    return len(dropped)


def _begins(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "placeholder"


def _is_read_tensor(inside: Node, argument: Any) -> bool:
    return isinstance(argument, Node) and bool(inside.users and view.tensors(inside))
