"""Rewrites written as plain Python over aten ops: the decorators `rewrite` and `graph_pass`, and
the matcher.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, overload

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.proxy import GraphAppendingTracer, Proxy

from iocompiler.errors import BadPattern, BadReplacement
from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.graph.findings import Rewrite, record

Match: TypeAlias = dict[str, Any]
Stage: TypeAlias = Literal["graph", "flat"]

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


@dataclass(frozen=True)
class GraphPass:
    """A free-form pass: ``function(gm)`` edits the graph and returns how many sites it changed.

    ``stage`` says which graph it sees: "graph", what the user wrote, before autograd; or "flat",
    each functional graph (forward, backward, inference) after it.
    """

    name: str
    function: Callable[[GraphModule], int]
    stage: Stage = "graph"
    respells: bool = (
        False  # only spells the same operators differently: no reason to leave Dynamo's own graph
    )

    def __call__(self, gm: GraphModule) -> int:
        return self.function(gm)

    def __reduce__(self) -> Any:
        return _by_name(self, self.function)

    def __deepcopy__(self, memo: object) -> GraphPass:
        return self


@overload
def graph_pass(function: Callable[[GraphModule], int]) -> GraphPass: ...
@overload
def graph_pass(
    *, stage: Stage = ..., respells: bool = ...
) -> Callable[[Callable[[GraphModule], int]], GraphPass]: ...
def graph_pass(
    function: Callable[[GraphModule], int] | None = None,
    *,
    stage: Stage = "graph",
    respells: bool = False,
) -> Any:
    """Make a pass of ``f(gm) -> int``, the number of sites changed; its name is the function's.

    Also ``@graph_pass(stage="flat")``; the arguments are those of `GraphPass`.
    """
    if function is None:
        return lambda f: GraphPass(f.__name__, f, stage, respells)
    return GraphPass(function.__name__, function, stage, respells)


@dataclass(frozen=True)
class RewritePass:
    """A pass that replaces every match of its patterns; made by `rewrite`."""

    name: str
    patterns: tuple[Graph, ...]
    where: Callable[[Match], bool] | None
    replacement: Callable[..., Any]
    stage: Stage = "graph"
    respells: bool = False

    def __call__(self, gm: GraphModule) -> int:
        matcher = Matcher(gm)
        targets = {_target(pattern) for pattern in self.patterns}
        changed = 0
        for root in view.calls(gm):
            if root._erased or not (root.target in targets or None in targets):
                continue
            for pattern in self.patterns:
                match = matcher.match(pattern, root)
                if match is not None and (self.where is None or self.where(match)):
                    self._replace(gm, root, match)
                    changed += 1
                    matcher = matcher.again(gm)
                    break
        return changed

    def __reduce__(self) -> Any:
        return _by_name(self, self.replacement)

    def __deepcopy__(self, memo: object) -> RewritePass:
        return self

    def _replace(self, gm: GraphModule, root: Node, match: Match) -> None:
        names = inspect.signature(self.replacement).parameters
        new = edit.insert(gm, self.replacement, *(match[name] for name in names), near=root)
        if not isinstance(new, Node):
            raise BadReplacement(
                name=self.name, new=type(new).__name__, old="a tensor", where=view.where(root)
            )
        if _shown(new) != _shown(root):
            raise BadReplacement(
                name=self.name, new=_shown(new), old=_shown(root), where=view.where(root)
            )
        record(gm, Rewrite(self.name, view.where(root)))
        edit.redirect(gm, root, new)


def _by_name(made: GraphPass | RewritePass, function: Callable[..., Any]) -> Any:
    """How a pass is pickled: as where it stands, under the name of the function it was made of."""
    module, name = function.__module__, function.__qualname__
    if getattr(sys.modules.get(module), name, None) is not made:
        raise pickle.PicklingError(f"the pass {made.name!r} does not stand as {module}.{name}")
    return _standing, (module, name)


def _standing(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def rewrite(
    *patterns: Callable[..., Any],
    where: Callable[[Match], bool] | None = None,
    stage: Stage = "graph",
) -> Callable[[Callable[..., Any]], RewritePass]:
    """Replace what a pattern matches by what the decorated function computes.

    A pattern is a function over aten ops. Its parameters match anything, tensor or constant, the
    same thing wherever the same parameter stands; operands of commutative operators match in either
    order, and arguments left at their defaults match spelled out. An inner node of a match that
    something else reads too is no match.

    Args:
        patterns: the spellings looked for, each with the same parameter names.
        where: called with the match, parameter name to node or constant; false declines it.
        stage: "graph" or "flat", see `GraphPass`.

    Returns:
        a decorator that makes a pass, named as the function, out of the replacement; its parameters
        are among the patterns'.

    Raises:
        BadPattern: a pattern cannot be read.

    Example::

        @rewrite(lambda x: aten.relu.default(aten.relu.default(x)))
        def relu_of_relu(x):
            return aten.relu.default(x)
    """

    def decorate(replacement: Callable[..., Any]) -> RewritePass:
        name = replacement.__name__
        graphs = tuple(trace_pattern(pattern, name) for pattern in patterns)
        wanted = set(inspect.signature(replacement).parameters)
        for graph in graphs:
            missing = wanted - {node.name for node in graph.find_nodes(op="placeholder")}
            if missing:
                raise BadPattern(
                    name=name, detail=f"the pattern binds no {', '.join(sorted(missing))}"
                )
        return RewritePass(name, graphs, where, replacement, stage)

    return decorate


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


def _target(pattern: Graph) -> Any:
    """What the pattern's result calls; None where that is anything."""
    result = pattern.output_node().args[0]
    return result.target if isinstance(result, Node) and result.op == "call_function" else None


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


def _shown(node: Node) -> str:
    """Shape, dtype and device of the node's value, for comparing and for messages."""
    found = view.tensors(node)
    return ", ".join(f"{str(t.dtype)[6:]}{list(t.shape)} on {t.device}" for t in found) or str(
        view.value(node)
    )
