"""Whether an attention may run as one: nothing in between is switched, or written in place."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TypeAlias

from torch.fx import GraphModule, Node

from iocompiler.graph import view
from iocompiler.passes.attention.dims.views import Operand
from iocompiler.passes.attention.reading.description import Attention, Declined

Roots: TypeAlias = Mapping[Node, frozenset[Node]]


def check(gm: GraphModule, found: Attention) -> None:
    """Raise `Declined` where something in between is switched, or written in place."""
    regions = view.regions(gm)
    if len({regions.get(node) for node in found.interior}) > 1:
        raise Declined("grad mode or autocast changes in between")
    writes = [node for node in gm.graph.nodes if view.mutates(node)]
    if not writes:
        return
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    roots = view.roots(gm)
    start, end = min(order[node] for node in found.interior), order[found.anchor]
    looked = _looked(found, roots)
    for node in writes:
        written = frozenset().union(*(roots[target] for target in view.mutates(node)))
        # what a write returns (a cache of keys, filled) looks at what it has written
        since = [order[each] for each, memory in looked if written & memory and each is not node]
        read = since or written & _storages(found, roots)
        if read and min([*since, start]) <= order[node] <= end:
            raise Declined(f"{view.where(node) or node.name} writes what the attention reads")
        if order[node] > end and written & roots[found.anchor]:
            # our backward reads the output, that of a product does not
            raise Declined(f"{view.where(node) or node.name} writes into the output")


def _storages(found: Attention, roots: Roots) -> frozenset[Node]:
    """Those the operands lie in."""
    return frozenset().union(*(roots[each.stages[-1][0]] for each in _operands(found)))


def _looked(found: Attention, roots: Roots) -> list[tuple[Node, frozenset[Node]]]:
    """The nodes that have looked at memory which the attention will read, and at which: all that
    the operands are views or copies of, and the masks. What makes an operand's memory looks at
    nothing: that may be filled (a cache of keys) before anything does.
    """
    looked: list[tuple[Node, frozenset[Node]]] = []
    for operand in _operands(found):
        nodes = [node for node, _ in operand.stages]
        looked += [(node, roots[node] | roots[of]) for node, of in pairwise(nodes)]
        if roots[nodes[-1]] != {nodes[-1]}:
            looked.append((nodes[-1], roots[nodes[-1]]))
    steps = (*found.steps, *([found.sink] if found.sink else []))
    held = [getattr(each, "of", each) for step in steps for each in vars(step).values()]
    return looked + [(each, roots[each]) for each in held if isinstance(each, Node)]


def _operands(found: Attention) -> tuple[Operand, ...]:
    return found.query, found.key, found.value
