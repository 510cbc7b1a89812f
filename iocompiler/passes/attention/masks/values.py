"""Values of one element of a tensor, as far as they can be said without running: numbers, index
arithmetic, conditions.

A condition is a formula over comparisons ``e >= 0`` of affine index expressions; a comparison is
folded where the bounds of the indices decide it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy

from iocompiler.graph.patterns import HIDES


@dataclass(frozen=True)
class Index:
    """An integer that is affine in the indices."""

    expr: sympy.Expr


@dataclass(frozen=True)
class Number:
    """A constant."""

    value: float


@dataclass(frozen=True)
class Select:
    """``then`` where the condition holds, ``other`` elsewhere."""

    condition: Formula
    then: Value
    other: Value


@dataclass(frozen=True)
class Unknown:
    """Not known, but not larger than ``bound`` either way, nor smaller than ``least``."""

    bound: float = math.inf
    least: float = 0.0


@dataclass(frozen=True)
class AtLeast:
    """The comparison ``expr >= 0``."""

    expr: sympy.Expr


@dataclass(frozen=True)
class Both:
    left: Formula
    right: Formula


@dataclass(frozen=True)
class Either:
    left: Formula
    right: Formula


@dataclass(frozen=True)
class Opaque:
    """A condition read from a tensor."""

    key: Any
    negated: bool = False


Formula: TypeAlias = bool | AtLeast | Both | Either | Opaque
Value: TypeAlias = Index | Number | Select | Unknown | bool | AtLeast | Both | Either | Opaque
Bounds: TypeAlias = Mapping[sympy.Symbol, sympy.Expr]
"""For each index, its size."""

LONGEST = 2**20
"""No index, and no size that is symbolic, is larger."""

FORMULAS = (bool, AtLeast, Both, Either, Opaque)


def at_least(expr: sympy.Expr, bounds: Bounds) -> Formula:
    """``expr >= 0``, decided where the bounds of the indices do."""
    expr = sympy.expand(expr)
    low, high = extremes(expr, bounds)
    if low is not None and low.is_nonnegative:
        return True
    if high is not None and high.is_negative:
        return False
    return AtLeast(expr)


def extremes(expr: sympy.Expr, bounds: Bounds) -> tuple[sympy.Expr | None, sympy.Expr | None]:
    """The least and the greatest value of an affine expression; None twice where it is not."""
    low = high = expr
    for symbol, extent in bounds.items():
        if symbol not in expr.free_symbols:
            continue
        slope = sympy.expand(expr).coeff(symbol, 1)
        if slope.free_symbols & bounds.keys() or sympy.degree(expr, symbol) != 1:
            return None, None
        if slope.is_nonnegative:
            low, high = low.subs(symbol, 0), high.subs(symbol, extent - 1)
        elif slope.is_nonpositive:
            low, high = low.subs(symbol, extent - 1), high.subs(symbol, 0)
        else:
            return None, None
    return sympy.expand(low), sympy.expand(high)


def both(left: Formula, right: Formula) -> Formula:
    if left is False or right is False:
        return False
    if left is True or left == right:
        return right
    return left if right is True else Both(left, right)


def either(left: Formula, right: Formula) -> Formula:
    if left is True or right is True:
        return True
    if left is False or left == right:
        return right
    return left if right is False else Either(left, right)


def negate(formula: Formula, bounds: Bounds) -> Formula:
    if isinstance(formula, bool):
        return not formula
    if isinstance(formula, AtLeast):
        return at_least(-formula.expr - 1, bounds)
    if isinstance(formula, Opaque):
        return Opaque(formula.key, not formula.negated)
    left, right = negate(formula.left, bounds), negate(formula.right, bounds)
    return either(left, right) if isinstance(formula, Both) else both(left, right)


def conjuncts(formula: Formula) -> list[Formula]:
    """The formulas that all must hold."""
    if isinstance(formula, Both):
        return conjuncts(formula.left) + conjuncts(formula.right)
    return [] if formula is True else [formula]


def select(condition: Formula, then: Value, other: Value) -> Value:
    if isinstance(then, Select):
        then = _where(condition, then)
    if isinstance(other, Select):
        other = _where(negate(condition, {}), other)
    if condition is True or then == other:
        return then
    if condition is False:
        return other
    if isinstance(then, FORMULAS) and isinstance(other, FORMULAS):
        if then is True and other is False:
            return condition
        return both(condition, then) if other is False else Unknown()
    return Select(condition, then, other)


def _where(formula: Formula, value: Value) -> Value:
    """What the value is where a formula holds."""
    opposite = negate(formula, {})
    while isinstance(value, Select) and value.condition in (formula, opposite):
        value = value.then if value.condition == formula else value.other
    return value


def magnitude(value: Value, bounds: Bounds | None = None) -> float:
    """What the value does not exceed, either way; inf where that is not known."""
    if isinstance(value, Number):
        return abs(value.value)
    if isinstance(value, Select):
        return max(magnitude(value.then, bounds), magnitude(value.other, bounds))
    if isinstance(value, Unknown):
        return value.bound
    if isinstance(value, Index):
        low, high = extremes(value.expr, bounds or {})
        if low is not None and high is not None and low.is_number and high.is_number:
            return max(abs(float(low)), abs(float(high)))
        terms = sympy.Add.make_args(sympy.expand(value.expr))
        return float(sum(abs(t.subs(dict.fromkeys(t.free_symbols, LONGEST))) for t in terms))
    return 1.0


def spread(value: Value) -> float:
    """`magnitude`, but for what hides the scores that it is added to."""
    if isinstance(value, Select):
        sides = (value.then, value.other)
        left = [x for x in sides if not isinstance(x, Number) or x.value > HIDES]
        return max((spread(x) for x in left), default=0.0)
    return magnitude(value)
