"""One element of a tensor as a `Value`: arange arithmetic, comparisons and masks followed back
through the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import NoneType
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import view
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.masks import gather
from iocompiler.passes.attention.masks.arithmetic import (
    COMPARISONS,
    applied,
    combine,
    compare,
    logarithm,
    plain,
    power,
)
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
from iocompiler.passes.attention.masks.values import (
    FORMULAS,
    Bounds,
    Formula,
    Index,
    Number,
    Opaque,
    Unknown,
    Value,
    at_least,
    both,
    either,
    magnitude,
    negate,
    select,
)

aten = torch.ops.aten
_WHOLE = (torch.int32, torch.int64, torch.float32, torch.float64)  # what holds a position exactly
_DEEPEST = 200
LEARNED = 1e3  # what no entry of a learned table of biases exceeds
_AND = ("logical_and", "bitwise_and", "__and__")
_OR = ("logical_or", "bitwise_or", "__or__")
_NOT = ("logical_not", "bitwise_not")
_ARITHMETIC = ("add", "sub", "mul", "div", "rsub", "minimum", "maximum")
_BOUNDED = {"tanh": 1.0, "sigmoid": 1.0, "embedding": LEARNED}
_NO_LARGER = ("abs", "neg", "min", "max", "floor", "clamp", "clamp_min", "clamp_max", "relu")


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
        if name in _RULES:
            return _RULES[name](self, node, at)
        if name in COMPARISONS:
            return compare(name, *self._operands(node, at), self.bounds)
        if name in _AND or name in _OR or name in _NOT:
            return self._logic(name, node, at)
        if name in _ARITHMETIC:
            return self._arithmetic(name, node, at)
        if name == "pow":
            return power(*self._operands(node, at), self.bounds)
        if name in _BOUNDED:
            return Unknown(_BOUNDED[name])
        return self._no_larger(name, node, at) if name in _NO_LARGER else None

    # conversions

    def _converted(self, node: Node, value: Value) -> Value | None:
        dtype = views.dtype(node)
        if dtype == torch.bool:
            return self._formula(value)
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

    # operators

    def _operands(self, node: Node, at: At) -> tuple[Value, Value]:
        left, right = (self._operand(node.args[k], at) for k in (0, 1))
        return left, right

    def _operand(self, operand: Any, at: At) -> Value:
        """The element of a broadcast operand."""
        return self.value(operand, of_operand(operand, at))

    def _logic(self, name: str, node: Node, at: At) -> Value | None:
        if views.dtype(node) != torch.bool:
            return None
        found = [self._formula(self._operand(each, at)) for each in node.args]
        values = [each for each in found if each is not None]
        if len(values) < len(found):
            return None
        if name in _NOT:
            return negate(values[0], self.bounds)
        return (both if name in _AND else either)(values[0], values[1])

    def _formula(self, value: Value) -> Formula | None:
        if isinstance(value, FORMULAS):
            return value
        if isinstance(value, Unknown):
            return None
        result = compare("ne", value, Number(0.0), self.bounds)
        return result if isinstance(result, FORMULAS) else None

    def _arithmetic(self, name: str, node: Node, at: At) -> Value | None:
        left, right = self._operands(node, at)
        if views.dtype(node) == torch.bool:
            if (
                not isinstance(left, FORMULAS)
                or not isinstance(right, FORMULAS)
                or name not in ("mul", "add")
            ):
                return None
            return both(left, right) if name == "mul" else either(left, right)
        if node.kwargs.get("rounding_mode") is not None:
            return None
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if not isinstance(alpha, (int, float)):
            return None
        return combine(name, plain(left), plain(right), float(alpha))

    def _no_larger(self, name: str, node: Node, at: At) -> Value | None:
        values = [self._operand(each, at) for each in node.args]
        if name == "neg":
            return combine("mul", values[0], Number(-1.0), 1.0)
        limits = _limits(node) if "clamp" in name else None
        exact = applied(partial(_clamped, limits), plain(values[0])) if limits else None
        return exact or Unknown(max(magnitude(each) for each in values))

    def _log(self, node: Node, at: At) -> Value | None:
        return applied(logarithm, plain(self._operand(node.args[0], at)))

    def _where(self, node: Node, at: At) -> Value | None:
        if len(node.args) != 3:
            return None
        condition = self._formula(self._operand(node.args[0], at))
        if condition is None:
            return None
        then, other = (self._operand(each, at) for each in node.args[1:])
        return select(condition, then, other)

    def _masked_fill(self, node: Node, at: At) -> Value | None:
        condition = self._formula(self._operand(node.args[1], at))
        if condition is None:
            return None
        return select(condition, self._operand(node.args[2], at), self._operand(node.args[0], at))

    def _tril(self, node: Node, at: At) -> Value:
        return self._triangle(node, at, at[-2] - at[-1] + _diagonal(node))

    def _triu(self, node: Node, at: At) -> Value:
        return self._triangle(node, at, at[-1] - at[-2] - _diagonal(node))

    def _triangle(self, node: Node, at: At, inside: sympy.Expr) -> Value:
        kept = at_least(inside, self.bounds)
        zero: Value = False if views.dtype(node) == torch.bool else Number(0.0)
        return select(kept, self.value(node.args[0], at), zero)


_RULES: dict[str, Callable[[_Reading, Node, At], Value | None]] = {
    "where": _Reading._where,
    "masked_fill": _Reading._masked_fill,
    "tril": _Reading._tril,
    "triu": _Reading._triu,
    "index": gather.picked,
    "diff": gather.differences,
    "cumsum": gather.cumulated,
    "log": _Reading._log,
}


def _limits(node: Node) -> tuple[float, float] | None:
    """Between which numbers a clamp leaves its input as it is; None where these are not known."""
    given = view.named(node)
    low, high = given.get("min"), given.get("max")
    if not all(isinstance(each, (int, float, NoneType)) for each in (low, high)):
        return None
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))


def _clamped(limits: tuple[float, float], number: float) -> float:
    return min(max(number, limits[0]), limits[1])


def _diagonal(node: Node) -> int:
    return int(node.args[1]) if len(node.args) > 1 else int(node.kwargs.get("diagonal", 0))  # type: ignore[arg-type]
