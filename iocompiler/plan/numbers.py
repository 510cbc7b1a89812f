"""Numbers computed from sizes (``1 / (n - 1)``), as arithmetic inside of a kernel."""

from __future__ import annotations

from functools import reduce

import sympy
import torch

from iocompiler.tile.program import Builder

_QUOTIENTS = {"FloatTrueDiv", "IntTrueDiv"}
_POWERS = {"Pow", "FloatPow", "PowByNatural"}
_ROOTS = {"OpaqueUnaryFn_sqrt"}


class NoNumber(Exception):
    """The expression has a function that kernels do not compute."""


def number(build: Builder, expr: sympy.Expr, dtype: torch.dtype) -> int:
    """The value of a float expression over sizes, computed in ``dtype``.

    Raises:
        NoNumber: as above, or the number is no function of sizes (``x.item()``).
    """
    name = type(expr).__name__
    if expr.is_number and not expr.free_symbols:
        return build.const(float(expr), dtype)
    if expr.is_Symbol and not expr.is_integer:
        raise NoNumber("a number that only a run finds")
    if expr.is_Symbol or (expr.is_integer and expr.is_polynomial(*expr.free_symbols)):
        return build.const(expr, dtype)
    if name == "ToFloat":
        return number(build, expr.args[0], dtype)
    if expr.is_Add or expr.is_Mul:
        parts = [number(build, part, dtype) for part in expr.args]
        return reduce(lambda a, b: build.map("add" if expr.is_Add else "mul", a, b), parts)
    if name in _QUOTIENTS:
        return build.map("div", *(number(build, part, dtype) for part in expr.args))
    if name in _ROOTS:
        return build.map("sqrt", number(build, expr.args[0], dtype))
    if name in _POWERS:
        return _power(build, expr, dtype)
    raise NoNumber(f"{name} of sizes")


def _power(build: Builder, expr: sympy.Expr, dtype: torch.dtype) -> int:
    base, exponent = expr.args
    value = number(build, base, dtype)
    if exponent in (0.5, sympy.Rational(1, 2)):
        return build.map("sqrt", value)
    if exponent in (-0.5, sympy.Rational(-1, 2)):
        return build.map("div", build.const(1.0, dtype), build.map("sqrt", value))
    if exponent == -1:
        return build.map("div", build.const(1.0, dtype), value)
    if exponent.is_number and exponent == int(exponent) and 2 <= int(exponent) <= 4:
        return reduce(lambda a, b: build.map("mul", a, b), [value] * int(exponent))
    raise NoNumber(f"power {exponent} of a size")
