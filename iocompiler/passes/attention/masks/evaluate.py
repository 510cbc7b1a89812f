"""One element of a tensor as a `Value`: arange arithmetic, comparisons and masks followed back
through the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import view
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.masks.arithmetic import compare
from iocompiler.passes.attention.masks.places import (
    ARANGES,
    At,
    arange,
    filled,
    given,
    moved,
    of_operand,
    scalar,
)
from iocompiler.passes.attention.masks.rules import RULES
from iocompiler.passes.attention.masks.values import (
    FORMULAS,
    Bounds,
    Formula,
    Index,
    Number,
    Opaque,
    Unknown,
    Value,
    magnitude,
    select,
)

aten = torch.ops.aten
_WHOLE = (torch.int32, torch.int64, torch.float32, torch.float64)  # what holds a position exactly
_DEEPEST = 200


class Evaluator:
    """Evaluates elements of the tensors of one graph."""

    def __init__(self, gm: GraphModule) -> None:
        written = {
            node
            for each in gm.graph.nodes
            for node in view.mutates(each)
            if each.target is not aten.detach_.default
        }
        roots = view.roots(gm) if written else {}
        self._written = (
            frozenset().union(*(roots[node] for node in written)) if written else frozenset()
        )
        self._roots = roots

    def element(self, node: Any, at: Sequence[sympy.Expr], bounds: Bounds) -> Value:
        """The element of ``node`` at these indices, whose sizes are ``bounds``."""
        return _Reading(self, bounds).value(node, tuple(at))

    def is_written(self, node: Node) -> bool:
        """Whether the storage of the node is written in place somewhere in the graph."""
        return bool(self._roots.get(node, frozenset()) & self._written)

    def is_snapshot(self, node: Node) -> bool:
        """Whether the node is a copy of what is written in place: only that has the elements that
        were there.
        """
        if node.target is not aten.clone.default or self.is_written(node):
            return False
        return self.is_written(node.all_input_nodes[0])


class _Reading:
    def __init__(self, evaluator: Evaluator, bounds: Bounds) -> None:
        self._evaluator = evaluator
        self.bounds = dict(bounds)
        self._depth = 0

    def value(self, node: Any, at: At) -> Value:
        if isinstance(node, (bool, int, float)):
            return node if isinstance(node, bool) else Number(float(node))
        if not isinstance(node, Node):
            return Unknown()
        if not isinstance(view.value(node), torch.Tensor):
            return scalar(node)
        if self._evaluator.is_written(node) or self._depth > _DEEPEST:
            return self.opaque(node, at)
        self._depth += 1
        called = node.op == "call_function"
        found = self._call(node, at) if called else given(node, at, self.bounds)
        self._depth -= 1
        if found is None or (views.dtype(node) == torch.bool and not isinstance(found, FORMULAS)):
            return self.opaque(node, at)
        if isinstance(found, Index) and views.dtype(node) not in _WHOLE:
            return Unknown(magnitude(found))
        return found

    def opaque(self, node: Node, at: At) -> Value:
        return Opaque((node, at)) if views.dtype(node) == torch.bool else Unknown()

    def _call(self, node: Node, at: At) -> Value | None:
        name = str(getattr(node.target, "_opname", node.target))
        if self._evaluator.is_snapshot(node):
            return None
        if node.target in (*views.COPIES, *views.CASTS):
            return self._converted(node, self.value(node.args[0], at))
        place = moved(node, at, self.bounds)
        if place is not None:
            return self.value(node.args[0], place)
        if node.target in ARANGES:
            return arange(node, at)
        element = filled(node)
        if element is not None:
            return self._converted(node, element)
        rule = RULES.get(name)
        return None if rule is None else rule(self, node, at)

    def operand(self, node: Any, at: At) -> Value:
        """The element of a broadcast operand."""
        return self.value(node, of_operand(node, at))

    def _converted(self, node: Node, value: Value) -> Value | None:
        dtype = views.dtype(node)
        if dtype == torch.bool:
            return self.formula(value)
        if isinstance(value, FORMULAS):
            return select(value, Number(1.0), Number(0.0))
        if (
            isinstance(value, Number)
            and not dtype.is_floating_point
            and not value.value.is_integer()
        ):
            return (
                Number(float(math.trunc(value.value))) if math.isfinite(value.value) else Unknown()
            )
        return value

    def formula(self, value: Value) -> Formula | None:
        """A value as the condition that it is not zero; None where it cannot be said."""
        if isinstance(value, FORMULAS):
            return value
        if isinstance(value, Unknown):
            return None
        result = compare("ne", value, Number(0.0), self.bounds)
        return result if isinstance(result, FORMULAS) else None
