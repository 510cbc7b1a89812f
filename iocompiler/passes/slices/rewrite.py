"""Slices moved up through what computes each of their rows by itself."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from iocompiler.graph import rewrite, view
from iocompiler.graph.findings import Rewrite, record
from iocompiler.graph.match import graph_pass
from iocompiler.passes.slices.rules import cuts, moves_only, resized

aten = torch.ops.aten


class Cut(NamedTuple):
    """A range of one dimension: ``start`` and ``end`` as a slice takes them, and its length."""

    dim: int
    start: int
    end: int
    length: int


@graph_pass
def slices(gm: GraphModule) -> int:
    """Of what is cut to a part that is at most half, only that part is computed.

    Before::

        y = aten.linear.default(x, w, b)          # x [B, S, D]
        z = aten.layer_norm.default(x + y, [D], g, h)
        pooled = aten.select.int(z, 1, 0)

    After::

        first = aten.slice.Tensor(x, 1, 0, 1)
        y = aten.linear.default(first, w, b)
        z = aten.layer_norm.default(first + y, [D], g, h)
        pooled = aten.select.int(z, 1, 0)

    A classifier reads one token of its last layer, a generated word follows from the last position:
    of that layer, attention's queries and all that stands behind them run for it alone. The slice
    stops where something else reads the whole, where a result depends on the others along its
    dimension, at what is written in place, and where its range is not known. Gradients of what is
    not computed are zeros, as before.
    """
    roots = view.roots(gm)
    written = view.written(gm, roots)
    sites = 0
    for node in list(view.calls(gm, aten.select.int, aten.slice.Tensor)):
        cut = None if node._erased else _cut(node)
        source = node.args[0]
        if cut is None or not isinstance(source, Node):
            continue
        demands = _Demands(node, source, cut.dim)
        demands.walk(lambda each: not roots[each] & written)
        if not demands.gain:
            continue
        lines = view.where(node)
        for made in _rebuild(gm, node, source, demands, cut):  # what is cut next is made of it
            roots[made] = view.roots_of(made, roots)
        record(gm, Rewrite("slices", lines, f"{demands.gain} operators"))
        sites += 1
    return sites


def _cut(node: Node) -> Cut | None:
    """The range of a select or slice, where it is known and at most half of what there is."""
    source, dim, *rest = view.spelled_out(node)
    whole = view.value(source)
    if not isinstance(dim, int) or not all(isinstance(r, (int, type(None))) for r in rest):
        return None
    dim %= whole.dim()
    if node.target is aten.select.int:
        start, length = rest[0], 1
        end = sys.maxsize if start == -1 else start + 1
    else:
        start, end, step = rest[0] or 0, sys.maxsize if rest[1] is None else rest[1], rest[2]
        length = view.value(node).shape[dim]
        if step != 1:
            return None
    size = whole.shape[dim]
    if isinstance(size, torch.SymInt):
        size = size.node.hint if size.node.has_hint() else 0
    if not isinstance(length, int) or not 0 < 2 * length <= size:
        return None
    return Cut(dim, start, end, length)


class _Demands:
    """Which nodes are read along one range alone, and which of their arguments are cut.

    Attributes:
        cut: for each node that is, in reverse order, its dimension and its arguments'.
        gain: how many of them compute something.
    """

    def __init__(self, last: Node, source: Node, dim: int) -> None:
        self._last = last
        self._asked: dict[Node, dict[Node, int | None]] = {source: {last: dim}}
        self._waiting = {source}
        self.cut: dict[Node, tuple[int, dict[Node, int]]] = {}
        self.gain = 0

    def walk(self, allowed: Any) -> None:
        node = self._last.prev
        while self._waiting:
            if node in self._waiting:
                self._waiting.remove(node)
                self._take(node, allowed)
            node = node.prev

    def _take(self, node: Node, allowed: Any) -> None:
        dims = set(self._asked[node].values())
        (dim,) = dims if len(dims) == 1 else (None,)
        if dim is None or set(node.users) - set(self._asked[node]) or not allowed(node):
            return
        arguments = cuts(node, dim) if node.op == "call_function" else None
        if arguments is None or not isinstance(view.value(node), torch.Tensor):
            return
        self.cut[node] = dim, arguments
        self.gain += not moves_only(node)
        for each in node.all_input_nodes:
            self._asked.setdefault(each, {})[node] = arguments.get(each)
            self._waiting.add(each)


def _rebuild(gm: GraphModule, last: Node, source: Node, demands: _Demands, cut: Cut) -> list[Node]:
    """The nodes again, on what is cut of their arguments, and the slice of the last one."""
    new: list[Node] = []
    made: dict[Node, Node] = {}
    parts: dict[tuple[Node, int], Node] = {}

    def part(node: Node, dim: int, near: Node) -> Node:
        if node in made:
            return made[node]
        found = parts.get((node, dim))
        if found is None:
            given = (node, dim, cut.start, cut.end)
            found = parts[node, dim] = rewrite.call(gm, aten.slice.Tensor, given, {}, near=near)
            new.append(found)
        return found

    for node, (dim, arguments) in reversed(demands.cut.items()):

        def of(each: Node, node: Node = node, arguments: dict[Node, int] = arguments) -> Node:
            return part(each, arguments[each], node) if each in arguments else each

        args, kwargs = map_arg((resized(node, dim, cut.length), node.kwargs), of)
        made[node] = rewrite.call(gm, node.target, args, dict(kwargs), near=node)
        new.append(made[node])
    result = made[source]
    if last.target is aten.select.int:
        result = rewrite.call(gm, aten.select.int, (result, cut.dim, 0), {}, near=last)
        new.append(result)
    rewrite.redirect(gm, last, result)
    for node in demands.cut:  # what is random is not erased with its readers
        rewrite.erase(gm, node)
    return [node for node in new if not node._erased]
