"""Equal calls with equal arguments, made once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.equal import frozen
from iocompiler.graph.match import graph_pass

aten = torch.ops.aten

# an operator of the user's may count its calls
_KNOWN = ("aten", "prims", "iocompiler")
# what they return is not made of what they are given
_UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


@graph_pass(respells=True)
def repeated(gm: GraphModule) -> int:
    """The same call of the same tensors is one, whose readers' gradients are summed first.

    Before::

        a = aten.embedding.default(table, buckets); y = f(x, a)
        b = aten.embedding.default(table, buckets); z = f(y, b)

    After::

        a = aten.embedding.default(table, buckets); y = f(x, a); z = f(y, a)

    The forward would be the same without (AOTAutograd sees equal calls of one graph); in the
    backward each call would have a gradient of its own, and each gradient the kernels of its
    operator: attention's tables of distances, one a layer. Left alone: what is random, written or
    returned (two tensors stay two), operators of the user's, calls under different modes, and masks
    that something is chosen by (torch names how many each keeps, and would find one name twice).
    """
    roots, regions = view.roots(gm), view.regions(gm)
    (output,) = gm.graph.find_nodes(op="output")
    returned = _storages(output.all_input_nodes, roots)
    written = view.written(gm, roots)
    found: dict[Hashable, Node] = {}
    sites = 0
    for node in list(view.calls(gm)):
        touched = _storages((node, *node.all_input_nodes), roots)
        if not _is_function(node) or touched & written or roots[node] & returned:
            continue
        if any(map(view.finds_sizes, (node, *node.users))):
            continue
        key = (regions[node], node.target, frozen(node.args), frozen(node.kwargs))
        same = found.setdefault(key, node)
        if same is not node:
            rewrite.bypass(gm, node, same)
            sites += 1
    return sites


def _storages(nodes: Iterable[Node], roots: dict[Node, frozenset[Node]]) -> frozenset[Node]:
    return frozenset().union(*(roots[node] for node in nodes))


def _is_function(node: Node) -> bool:
    """Whether the call returns tensors, and the same for the same arguments."""
    if not isinstance(node.target, torch._ops.OpOverload) or not view.tensors(node):
        return False
    namespace, name = node.target._schema.name.split("::")
    known = namespace in _KNOWN and name not in _UNWRITTEN
    return known and not view.is_random(node) and not node.is_impure()
