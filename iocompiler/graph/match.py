"""The decorators that make passes: `rewrite`, of patterns in plain Python over aten ops, which
`matcher.py` finds; and `graph_pass`, of a function on the whole graph.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, overload

from torch.fx import Graph, GraphModule, Node

from iocompiler.errors import BadPattern, BadReplacement
from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.graph.findings import Rewrite, record
from iocompiler.graph.matcher import Match, Matcher, trace_pattern

Stage: TypeAlias = Literal["graph", "flat"]


@dataclass(frozen=True)
class GraphPass:
    """A free-form pass: ``function(gm)`` edits the graph and returns how many sites it changed.

    ``stage`` says which graph it sees: "graph", what the user wrote, before autograd; or "flat",
    each functional graph (forward, backward, inference) after it. One that ``respells`` only spells
    the same operators differently: what it changes is no reason to leave Dynamo's own graph.
    """

    name: str
    function: Callable[[GraphModule], int]
    stage: Stage = "graph"
    respells: bool = False

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


def _target(pattern: Graph) -> Any:
    """What the pattern's result calls; None where that is anything."""
    result = pattern.output_node().args[0]
    return result.target if isinstance(result, Node) and result.op == "call_function" else None


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


def _shown(node: Node) -> str:
    """Shape, dtype and device of the node's value, for comparing and for messages."""
    found = view.tensors(node)
    return ", ".join(f"{str(t.dtype)[6:]}{list(t.shape)} on {t.device}" for t in found) or str(
        view.value(node)
    )
