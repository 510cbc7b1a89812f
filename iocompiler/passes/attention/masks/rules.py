"""What single operators make of a `Value`: one rule an operator, by its name."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import NoneType
from typing import Any

import sympy
import torch
from torch.fx import Node

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
from iocompiler.passes.attention.masks.places import At
from iocompiler.passes.attention.masks.protocol import Reading, Rule
from iocompiler.passes.attention.masks.values import (
    FORMULAS,
    Formula,
    Number,
    Unknown,
    Value,
    at_least,
    both,
    either,
    magnitude,
    negate,
    select,
)

PRODUCT = 1e4  # what no product with positions exceeds, or the scores it is added to would too


def _pair(reading: Reading, node: Node, at: At) -> tuple[Value, Value]:
    left, right = (reading.operand(node.args[k], at) for k in (0, 1))
    return left, right


def _comparison(name: str) -> Rule:
    return lambda reading, node, at: compare(name, *_pair(reading, node, at), reading.bounds)


def _logic(combined: Callable[..., Formula]) -> Rule:
    def rule(reading: Reading, node: Node, at: At) -> Value | None:
        if views.dtype(node) != torch.bool:
            return None
        found = [reading.formula(reading.operand(each, at)) for each in node.args]
        return None if any(each is None for each in found) else combined(*found)

    return rule


def _not(reading: Reading, node: Node, at: At) -> Value | None:
    return _logic(partial(negate, bounds=reading.bounds))(reading, node, at)


def _arithmetic(name: str) -> Rule:
    def rule(reading: Reading, node: Node, at: At) -> Value | None:
        left, right = _pair(reading, node, at)
        if views.dtype(node) == torch.bool:
            return _of_conditions(name, left, right)
        if node.kwargs.get("rounding_mode") is not None:
            return None
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if not isinstance(alpha, (int, float)):
            return None
        return combine(name, plain(left), plain(right), float(alpha), reading.bounds)

    return rule


def _of_conditions(name: str, left: Value, right: Value) -> Value | None:
    if not isinstance(left, FORMULAS) or not isinstance(right, FORMULAS):
        return None
    if name not in ("mul", "add"):
        return None
    return both(left, right) if name == "mul" else either(left, right)


def _power(reading: Reading, node: Node, at: At) -> Value:
    return power(*_pair(reading, node, at), reading.bounds)


def _bounded(bound: float) -> Rule:
    return lambda reading, node, at: Unknown(bound)


def _same(reading: Reading, node: Node, at: At) -> Value:
    return reading.operand(node.args[0], at)


def _no_larger(reading: Reading, node: Node, at: At) -> Value:
    return Unknown(max(magnitude(reading.operand(each, at)) for each in node.args))


def _negated(reading: Reading, node: Node, at: At) -> Value:
    return combine("mul", reading.operand(node.args[0], at), Number(-1.0), 1.0)


def _inverse(reading: Reading, node: Node, at: At) -> Value:
    return combine("div", Number(1.0), plain(reading.operand(node.args[0], at)), 1.0)


def _clamp(reading: Reading, node: Node, at: At) -> Value:
    limits = _limits(node)
    source = plain(reading.operand(node.args[0], at))
    exact = applied(partial(_clamped, limits), source) if limits else None
    return exact or _no_larger(reading, node, at)


def _limits(node: Node) -> tuple[float, float] | None:
    """Between which numbers a clamp leaves its input as it is; None where these are not known."""
    given = view.named(node)
    low, high = given.get("min"), given.get("max")
    if not all(isinstance(each, (int, float, NoneType)) for each in (low, high)):
        return None
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))


def _clamped(limits: tuple[float, float], number: float) -> float:
    return min(max(number, limits[0]), limits[1])


def _log(reading: Reading, node: Node, at: At) -> Value | None:
    return applied(logarithm, plain(reading.operand(node.args[0], at)))


def _where(reading: Reading, node: Node, at: At) -> Value | None:
    if len(node.args) != 3:
        return None
    return _chosen(reading, at, *node.args)


def _masked_fill(reading: Reading, node: Node, at: At) -> Value | None:
    source, condition, value = node.args
    return _chosen(reading, at, condition, value, source)


def _chosen(reading: Reading, at: At, condition: Any, then: Any, other: Any) -> Value | None:
    holds = reading.formula(reading.operand(condition, at))
    if holds is None:
        return None
    return select(holds, reading.operand(then, at), reading.operand(other, at))


def _tril(reading: Reading, node: Node, at: At) -> Value:
    return _triangle(reading, node, at, at[-2] - at[-1] + _diagonal(node))


def _triu(reading: Reading, node: Node, at: At) -> Value:
    return _triangle(reading, node, at, at[-1] - at[-2] - _diagonal(node))


def _triangle(reading: Reading, node: Node, at: At, inside: sympy.Expr) -> Value:
    kept = at_least(inside, reading.bounds)
    zero: Value = False if views.dtype(node) == torch.bool else Number(0.0)
    return select(kept, reading.value(node.args[0], at), zero)


def _diagonal(node: Node) -> int:
    return int(node.args[1]) if len(node.args) > 1 else int(node.kwargs.get("diagonal", 0))  # type: ignore[arg-type]


_ARITHMETIC = ("add", "sub", "mul", "div", "rsub", "minimum", "maximum")
_NO_LARGER = ("abs", "min", "max", "floor", "relu")

RULES: dict[str, Rule] = {
    **{name: _comparison(name) for name in COMPARISONS},
    **{name: _logic(both) for name in ("logical_and", "bitwise_and", "__and__")},
    **{name: _logic(either) for name in ("logical_or", "bitwise_or", "__or__")},
    **dict.fromkeys(("logical_not", "bitwise_not"), _not),
    **{name: _arithmetic(name) for name in _ARITHMETIC},
    **dict.fromkeys(_NO_LARGER, _no_larger),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp),
    "neg": _negated,
    "reciprocal": _inverse,
    "pow": _power,
    "log": _log,
    "tanh": _bounded(1.0),
    "sigmoid": _bounded(1.0),
    "embedding": _bounded(gather.LEARNED),
    **dict.fromkeys(("einsum", "matmul", "bmm", "mm", "linear"), _bounded(PRODUCT)),
    **dict.fromkeys(("gather", "index_select"), gather.anywhere),
    "positive": _same,
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _tril,
    "triu": _triu,
    "index": gather.picked,
    "diff": gather.differences,
    "cumsum": gather.cumulated,
    "cat": gather.joined,
}
"""Operators by name."""
