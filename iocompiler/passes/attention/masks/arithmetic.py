"""Arithmetic and comparisons of `Value`s."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import sympy

from iocompiler.passes.attention.masks.values import (
    FORMULAS,
    Bounds,
    Formula,
    Index,
    Number,
    Select,
    Unknown,
    Value,
    at_least,
    both,
    either,
    extremes,
    magnitude,
    negate,
    select,
)

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "lt": operator.lt,
    "eq": operator.eq,
    "ne": operator.ne,
}


def compare(name: str, left: Value, right: Value, bounds: Bounds) -> Value:
    """``left (name) right``, a formula where both are affine or chosen between such."""
    if isinstance(left, Number) and isinstance(right, Number):
        return bool(COMPARISONS[name](left.value, right.value))
    if isinstance(left, FORMULAS):
        left = select(left, Number(1.0), Number(0.0))
    if isinstance(right, FORMULAS):
        right = select(right, Number(1.0), Number(0.0))
    for one, other, swapped in ((left, right, False), (right, left, True)):
        if isinstance(one, Select) and not isinstance(other, Select):
            parts = [
                compare(name, other, part, bounds)
                if swapped
                else compare(name, part, other, bounds)
                for part in (one.then, one.other)
            ]
            return _chosen(one.condition, parts[0], parts[1], bounds)
    a, b = affine(left), affine(right)
    if a is None or b is None:
        return Unknown()
    return _order(name, sympy.expand(a - b), bounds)


def _chosen(condition: Formula, then: Value, other: Value, bounds: Bounds) -> Value:
    if not isinstance(then, FORMULAS) or not isinstance(other, FORMULAS):
        return Unknown()
    inverse = negate(condition, bounds)
    return either(both(condition, then), both(inverse, other))


def _order(name: str, difference: sympy.Expr, bounds: Bounds) -> Formula:
    up = at_least(difference if name in ("ge", "eq", "ne") else difference - 1, bounds)
    if name in ("ge", "gt"):
        return up
    down = at_least(-difference if name in ("le", "eq", "ne") else -difference - 1, bounds)
    if name in ("le", "lt"):
        return down
    equal = both(up, down)
    return equal if name == "eq" else negate(equal, bounds)


def combine(
    name: str, left: Value, right: Value, alpha: float, bounds: Bounds | None = None
) -> Value:
    """``left (name) alpha * right`` of two numbers of a tensor."""
    if isinstance(left, Select) and not isinstance(right, Select):
        parts = (combine(name, part, right, alpha, bounds) for part in (left.then, left.other))
        return select(left.condition, *parts)
    if isinstance(right, Select) and not isinstance(left, Select):
        parts = (combine(name, left, part, alpha, bounds) for part in (right.then, right.other))
        return select(right.condition, *parts)
    if isinstance(left, Number) and isinstance(right, Number):
        return _numbers(name, left.value, right.value, alpha)
    a, b = affine(left), affine(right)
    exact = name in ("add", "sub", "rsub") or (
        name == "mul" and (isinstance(left, Number) or isinstance(right, Number))
    )
    if a is not None and b is not None and exact and alpha.is_integer():
        times = sympy.Integer(int(alpha))
        table = {"add": a + times * b, "sub": a - times * b, "rsub": b - times * a, "mul": a * b}
        return Index(sympy.expand(table[name]))
    x, y = magnitude(left, bounds), abs(alpha) * magnitude(right, bounds)
    if name == "mul":
        return Unknown(x * y if x and y else 0.0)
    if name == "div":
        least = abs(right.value) if isinstance(right, Number) else getattr(right, "least", 0.0)
        return Unknown(x / least if least else math.inf)
    return Unknown(max(x, y) if name in ("minimum", "maximum") else x + y)


def applied(function: Callable[[float], float], value: Value) -> Value | None:
    """A function of a number, or of a choice between numbers; None of all else."""
    if isinstance(value, Number):
        return Number(function(value.value))
    if not isinstance(value, Select):
        return None
    then, other = applied(function, value.then), applied(function, value.other)
    return None if then is None or other is None else select(value.condition, then, other)


def logarithm(x: float) -> float:
    return math.log(x) if x > 0.0 else -math.inf if x == 0.0 else math.nan


def affine(value: Value) -> sympy.Expr | None:
    """The value as an affine integer expression."""
    if isinstance(value, Index):
        return value.expr
    if isinstance(value, Number) and value.value.is_integer():
        return sympy.Integer(int(value.value))
    return None


def plain(value: Value) -> Value:
    """A condition as the number it is."""
    return select(value, Number(1.0), Number(0.0)) if isinstance(value, FORMULAS) else value


def _numbers(name: str, left: float, right: float, alpha: float) -> Value:
    if name == "div" and right == 0.0:
        return Unknown()
    table = {
        "add": lambda: left + alpha * right,
        "sub": lambda: left - alpha * right,
        "rsub": lambda: right - alpha * left,
        "mul": lambda: left * right,
        "div": lambda: left / right,
        "minimum": lambda: min(left, right),
        "maximum": lambda: max(left, right),
    }
    return Number(table[name]())


def power(base: Value, exponent: Value, bounds: Bounds) -> Value:
    """``base ** exponent`` as bounds, where the exponent's range is known."""
    if not isinstance(base, Number) or base.value <= 0.0:
        return Unknown()
    whole = affine(exponent)
    most = magnitude(exponent, bounds)
    given = (-most, most) if whole is None else extremes(whole, bounds)
    ends = [float(end) for end in given if end is not None and sympy.sympify(end).is_number]
    if len(ends) < 2 or max(map(abs, ends)) > 64:
        return Unknown()
    powers = [base.value**end for end in ends]
    return Unknown(max(powers), min(powers))
