"""Patterns written as plain Python over aten ops, as graphs, and where in a graph they match."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.proxy import GraphAppendingTracer, Proxy

from iocompiler.errors import BadPattern
from iocompiler.graph import view

Match: TypeAlias = dict[str, Any]
"""Of each parameter of a pattern, the node or constant it stands for."""

aten = torch.ops.aten
_COMMUTES = {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.maximum.default,
    aten.minimum.default,
    aten.logical_and.default,
    aten.logical_or.default,
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.bitwise_xor.Tensor,
    aten.eq.Tensor,
    aten.ne.Tensor,
}
_DIMS = ("dim", "dim0", "dim1", "dims", "start_dim", "end_dim")
_ADDS_A_DIM = (aten.unsqueeze.default, aten.stack.default)
_OPERATORS = {
    operator.add: aten.add.Tensor,
    operator.sub: aten.sub.Tensor,
    operator.mul: aten.mul.Tensor,
    operator.truediv: aten.div.Tensor,
    operator.neg: aten.neg.default,
    operator.matmul: aten.matmul.default,
}


def trace_pattern(pattern: Callable[..., Any], name: str) -> Graph:
    """The graph of a pattern: a placeholder for each parameter, call nodes of operators, one
    output.
    """
    graph = Graph()
    tracer = GraphAppendingTracer(graph)
    parameters = [graph.placeholder(p) for p in inspect.signature(pattern).parameters]
    result = pattern(*(Proxy(node, tracer) for node in parameters))
    if not isinstance(result, Proxy) or result.node.op != "call_function":
        raise BadPattern(name=name, detail="a pattern returns the result of one operator")
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _OPERATORS.get(node.target, node.target)
        elif node.op != "placeholder":
            raise BadPattern(name=name, detail=f"write aten ops, not {node.op} {node.target}")
    graph.output(result.node)
    return graph


class Matcher:
    """Matches patterns in one graph; knows the regions of grad mode and autocast and what is
    written in place.
    """

    def __init__(self, gm: GraphModule) -> None:
        self._regions = view.regions(gm)
        self._writes = [node for node in gm.graph.nodes if view.mutates(node)]
        self._roots = view.roots(gm) if self._writes else {}
        self._order = (
            {node: position for position, node in enumerate(gm.graph.nodes)} if self._writes else {}
        )

    def again(self, gm: GraphModule) -> Matcher:
        """A matcher for the edited graph: what is written where has to be found again, if anything
        is.
        """
        return Matcher(gm) if self._writes else self

    def match(self, pattern: Graph, root: Node) -> Match | None:
        """What the pattern's parameters stand for where its result is ``root``; None where it does
        not match.
        """
        wanted = pattern.output_node().args[0]
        for state in _match(wanted, root, _State({}, {})):
            if self._safe(root, state):
                return state.bound
        return None

    def _safe(self, root: Node, state: _State) -> bool:
        inner = set(state.nodes.values()) - {root}
        matched = inner | {root}
        if any(set(node.users) - matched for node in inner):
            return False
        default = self._regions.get(root, view.ambient())
        if default.autocast or any(self._regions.get(node, default) != default for node in inner):
            return False  # under autocast an operator does not compute what it says
        return not self._writes or self._unwritten(matched, state)

    def _unwritten(self, matched: set[Node], state: _State) -> bool:
        """No tensor the match reads or makes is written between its first and its last node."""
        if any(view.mutates(node) for node in matched):
            return False
        touched = matched | {value for value in state.bound.values() if isinstance(value, Node)}
        storages = set().union(*(self._roots.get(node, {node}) for node in touched))
        first, last = (f(self._order[node] for node in matched) for f in (min, max))
        between = [write for write in self._writes if first < self._order[write] < last]
        written = [target for write in between for target in view.mutates(write)]
        return not any(self._roots[target] & storages for target in written)


@dataclass(frozen=True)
class _State:
    """What has been matched so far; never changed, so that a wrong turn leaves no trace."""

    bound: Match
    nodes: dict[Node, Node]


def _match(wanted: Any, found: Any, state: _State) -> Iterator[_State]:
    if not isinstance(wanted, Node):
        if _same(wanted, found):
            yield state
        elif isinstance(wanted, (list, tuple)) and isinstance(found, (list, tuple)):
            yield from _match_all(list(wanted), list(found), state)
    elif wanted.op == "placeholder":
        if wanted.name not in state.bound:
            yield replace(state, bound={**state.bound, wanted.name: found})
        elif _same(state.bound[wanted.name], found):
            yield state
    elif wanted in state.nodes:
        if state.nodes[wanted] is found:
            yield state
    elif isinstance(found, Node) and found.op == "call_function" and found.target == wanted.target:
        inside = replace(state, nodes={**state.nodes, wanted: found})
        theirs, ours = _arguments(wanted, found), _arguments(found, found)
        yield from _match_all(theirs, ours, inside)
        if found.target in _COMMUTES:
            yield from _match_all(theirs, [ours[1], ours[0], *ours[2:]], inside)


def _match_all(wanted: list[Any], found: list[Any], state: _State) -> Iterator[_State]:
    if len(wanted) != len(found):
        return
    if not wanted:
        yield state
        return
    for next_state in _match(wanted[0], found[0], state):
        yield from _match_all(wanted[1:], found[1:], next_state)


def _arguments(node: Node, found: Node) -> list[Any]:
    """The arguments of ``node``, dims counted from the front as for ``found``'s tensor."""
    values = view.spelled_out(node)
    if not isinstance(found.target, torch._ops.OpOverload):
        return values
    tensors = [t for read in found.all_input_nodes[:1] for t in view.tensors(read)]
    if not tensors:
        return values
    rank = tensors[0].dim() + (found.target in _ADDS_A_DIM)
    names = [argument.name for argument in found.target._schema.arguments]
    return [
        _from_the_front(value, rank) if name in _DIMS else value
        for name, value in zip(names, values, strict=True)
    ]


def _from_the_front(dims: Any, rank: int) -> Any:
    if isinstance(dims, (list, tuple)):
        return [_from_the_front(dim, rank) for dim in dims]
    return dims + rank if isinstance(dims, int) and dims < 0 else dims


def _same(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, Node) or isinstance(found, Node):
        return wanted is found
    if isinstance(wanted, (list, tuple)) and isinstance(found, (list, tuple)):
        return len(wanted) == len(found) and all(
            _same(w, f) for w, f in zip(wanted, found, strict=True)
        )
    if isinstance(wanted, bool) or isinstance(found, bool):
        return wanted is found
    return bool(wanted == found)
