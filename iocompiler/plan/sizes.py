"""Sizes as the planner sees them: ints or, where dynamic, sympy expressions, with what is proved.

Division is exact or refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from iocompiler.tile.index import Affine, Size


def size_of(value: Any) -> Size:
    """An int or SymInt as a `Size`; one that tracing has guarded to be 1 is 1: a tensor of that
    size may have been broadcast.
    """
    if isinstance(value, torch.SymInt):
        expr = value.node.expr
        if expr.is_Integer:
            return int(expr)
        return 1 if not expr.is_Symbol and statically_known_true(value == 1) else expr
    return int(value)


def normal(size: Size) -> Size:
    """Expanded, and a plain int where it is one: equal polynomials compare equal."""
    if isinstance(size, int):
        return size
    expanded = sympy.expand(size)
    return int(expanded) if expanded.is_Integer else expanded


def equal(a: Size, b: Size) -> bool:
    """Whether a == b for every value of the symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a == b or bool(normal(a - b) == 0)  # as they are written, first: that is cheap


def is_multiple(size: Size, of: int) -> bool:
    """Whether ``of`` divides the size for every value of the symbols."""
    if isinstance(size, int):
        return size % of == 0
    terms = sympy.Add.make_args(sympy.expand(size))
    return all(term.is_integer and term.as_coeff_Mul()[0] % of == 0 for term in terms)


def divide(a: Size, b: Size) -> Size | None:
    """a / b where it is exact for every value of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b != 0 and a % b == 0 else None
    return None if b == 0 else _quotient(a, b)


@lru_cache(maxsize=4096)
def _quotient(a: Size, b: Size) -> Size | None:
    # kept, as a plan asks for few quotients many times and sympy takes half a millisecond
    quotient = normal(sympy.cancel(sympy.sympify(a) / b))
    if isinstance(quotient, int):
        return quotient
    numerator, denominator = quotient.as_numer_denom()
    if denominator != 1 or any(not c.is_Integer for c in _coefficients(numerator)):
        return None
    return quotient


def _coefficients(expr: sympy.Expr) -> list[sympy.Expr]:
    return [term.as_coeff_Mul()[0] for term in sympy.Add.make_args(sympy.expand(expr))]


def nonnegative(size: Size) -> bool:
    """Whether size >= 0 is provable; symbols are at least 1, as an empty space runs no point."""
    if isinstance(size, int):
        return size >= 0
    # with s = t + 1 and t >= 0, a polynomial without negative coefficients is never negative
    shifted = size.subs({s: s + 1 for s in size.free_symbols})
    return all(c.is_number and c >= 0 for c in _coefficients(shifted))


def value_at(size: Size, hints: Mapping[str, int], default: int = 1024) -> int:
    """The size at the hinted values of its symbols."""
    if isinstance(size, int):
        return size
    return int(size.subs({s: hints.get(s.name, default) for s in size.free_symbols}))


def bounds(index: Affine, extents: Mapping[str, Size]) -> tuple[Size, Size] | None:
    """Least and greatest value (inclusive) of an index; None where it has an indirect term."""
    low: Size = index.const
    high: Size = index.const
    for name, coefficient in index.terms:
        if name not in extents:
            return None
        reach = coefficient * (extents[name] - 1)
        if nonnegative(coefficient):
            high = high + reach
        elif nonnegative(-coefficient):
            low = low + reach
        else:
            return None
    return low, high
