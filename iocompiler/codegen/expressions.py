"""Triton text of single operations: addresses, constants, casts, rows of the op table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce

import sympy
import torch
from sympy.printing.str import StrPrinter

from iocompiler.tile.index import Affine, Size
from iocompiler.tile.ops import MAPS
from iocompiler.tile.program import Constant

TYPES = {
    torch.float64: "tl.float64", torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16", torch.int64: "tl.int64", torch.int32: "tl.int32",
    torch.int16: "tl.int16", torch.int8: "tl.int8", torch.uint8: "tl.uint8", torch.bool: "tl.int1",
}  # fmt: skip

_INT32 = 2**31 - 1


class _SizePrinter(StrPrinter):  # type: ignore[misc]  # sympy has no types
    """Sizes as Triton reads them: floor division is ``//``, a symbol goes through a format."""

    def __init__(self, symbol: str = "{}"):
        super().__init__()
        self._symbol = symbol

    def _print_Symbol(self, expr: sympy.Symbol) -> str:  # noqa: N802  # sympy names the method after the class
        return self._symbol.format(expr.name)

    def _print_floor(self, expr: sympy.Expr) -> str:
        numerator, denominator = expr.args[0].as_numer_denom()
        return f"(({self._print(numerator)}) // ({self._print(denominator)}))"

    def _print_ceiling(self, expr: sympy.Expr) -> str:
        numerator, denominator = expr.args[0].as_numer_denom()
        return f"tl.cdiv({self._print(numerator)}, {self._print(denominator)})"

    def _print_FloorDiv(self, expr: sympy.Expr) -> str:  # noqa: N802  # sympy names the method after the class
        return f"(({self._print(expr.args[0])}) // ({self._print(expr.args[1])}))"

    def _print_Max(self, expr: sympy.Expr) -> str:  # noqa: N802
        return _nested("tl.maximum", [self._print(a) for a in expr.args])

    def _print_Min(self, expr: sympy.Expr) -> str:  # noqa: N802
        return _nested("tl.minimum", [self._print(a) for a in expr.args])

    def _print_PythonMod(self, expr: sympy.Expr) -> str:  # noqa: N802
        # of sizes: neither side is negative
        return f"(({self._print(expr.args[0])}) % ({self._print(expr.args[1])}))"

    _print_Mod = _print_PythonMod  # noqa: N815

    def _print_Pow(self, expr: sympy.Expr, rational: bool = False) -> str:  # noqa: N802
        base, exponent = expr.args
        if not (exponent.is_Integer and exponent > 0):
            raise TypeError(f"no size: {expr}")
        return "(" + " * ".join([f"({self._print(base)})"] * int(exponent)) + ")"


def _nested(function: str, operands: list[str]) -> str:
    return reduce(lambda a, b: f"{function}({a}, {b})", operands)


def size(value: Size) -> str:
    """A size as text over its symbols."""
    return str(value) if isinstance(value, int) else str(_SizePrinter().doprint(value))


def fits_int32(value: Size) -> bool:
    """Whether numbers below a size have 32 bits: known of a number; a symbol is passed as i32."""
    return abs(value) <= _INT32 if isinstance(value, int) else isinstance(value, sympy.Symbol)


def extent(value: Size) -> str:
    """A size as text, computed in 64 bits where 32 may not hold it."""
    if fits_int32(value):
        return size(value)
    return (
        str(value)
        if isinstance(value, int)
        else str(_SizePrinter("tl.cast({}, tl.int64)").doprint(value))
    )


def passes_int32(index: Affine, extents: Mapping[str, Size]) -> bool:
    """Whether the value of an index may pass 32 bits; an indirect term has 64 by itself."""
    reach: Size = abs(index.const)
    for name, coefficient in index.terms:
        if not name.startswith("%"):
            reach = reach + abs(coefficient) * extents[name]
    return not fits_int32(reach)


def affine(index: Affine, names: dict[str, str], wide: bool = False) -> str:
    """An index as text; ``names`` has that of axes and values, ``wide`` multiplies in 64 bits."""
    parts = []
    for name, coefficient in index.terms:
        text = names[name]
        if wide and not name.startswith("%"):
            text = f"{text}.to(tl.int64)"
        if coefficient == 1:
            parts.append(text)
        elif coefficient == -1:
            parts.append(f"-{text}")
        else:
            factor = extent(coefficient) if wide else size(coefficient)
            parts.append(
                f"{text} * {factor}" if isinstance(coefficient, int) else f"{text} * ({factor})"
            )
    if index.const != 0 or not parts:
        parts.append(
            size(index.const) if isinstance(index.const, int) else f"({size(index.const)})"
        )
    return " + ".join(parts).replace("+ -", "- ")


def needs_wide(elements: Size) -> bool:
    """Whether an address may pass 2**31 - 1: always possible where the extent is not known."""
    return not isinstance(elements, int) or elements > _INT32


def constant(value: Constant, dtype: torch.dtype) -> str:
    """A literal of ``dtype`` as a scalar text."""
    if isinstance(value, (int, float)):
        if dtype == torch.bool:
            return "True" if value else "False"
        if dtype.is_floating_point:
            return _float(float(value), dtype)
        if abs(int(value)) > _INT32:
            return f"tl.full([], {int(value)}, tl.int64)"
        return str(int(value))
    text = f"({size(value)})"
    return f"{text}.to({TYPES[dtype]})" if dtype.is_floating_point else text


def _float(value: float, dtype: torch.dtype) -> str:
    if math.isnan(value):
        return "float('nan')"
    if math.isinf(value):
        return "float('inf')" if value > 0 else "float('-inf')"
    if dtype == torch.float64:
        return f"tl.full([], {value!r}, tl.float64)"
    return repr(value)


# What the table's text cannot be for float64: these exist for float32 only.
_DOUBLE = {
    "div": "{0} / {1}",
    "sqrt": "tl.sqrt({0})",
    "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))",
    "tanh": "libdevice.tanh({0})",
    "normal_pdf": "0.3989422804014327 * tl.exp(-0.5 * {0} * {0})",
    "normal_cdf": "0.5 * libdevice.erfc({0} * -0.7071067811865476)",
}


def mapped(fn: str, operands: list[str], dtype: torch.dtype) -> str:
    """One row of the op table applied to operand texts, in parentheses where it is an operator."""
    row = MAPS[fn]
    template = _DOUBLE[fn] if dtype == torch.float64 and fn in _DOUBLE else row.triton
    return template.format(*operands)


def powered(base: Constant, exponent: str, dtype: torch.dtype) -> str:
    """A power of a number, by its logarithm; "" where that is none, or is not short of float64."""
    if not isinstance(base, (int, float)) or dtype != torch.float32:
        return ""
    value = torch.tensor(float(base), dtype=dtype).item()
    if not 2.0**-126 <= value < math.inf or value == 1.0:
        return ""
    exact = math.log2(value)
    high = torch.tensor(exact, dtype=dtype).item()
    return f"_power_of({exponent}, {high!r}, {exact - high!r})"


def divided(operand: str, divisor: Constant, dtype: torch.dtype, coarse: bool = False) -> str:
    """A quotient by a number, of the same bits and in fewer steps; "" where it is left as it is.

    A product with the inverse of a power of two is rounded as the quotient is. Of other numbers
    `_quotient` of the prelude corrects it; not of what has no bit but ones, where that is no proof.
    If ``coarse``, it need not be of the same bits: the product is all.
    """
    if not isinstance(divisor, (int, float)) or not dtype.is_floating_point:
        return ""
    value = torch.tensor(divisor, dtype=dtype).item()
    if not 2.0**-60 < abs(value) < 2.0**60:
        return ""
    mantissa = abs(math.frexp(value)[0])
    inverse = torch.tensor(1.0 / value, dtype=dtype).item()
    if mantissa == 0.5 or coarse:
        return f"{operand} * {constant(inverse, dtype)}"
    if dtype != torch.float32 or mantissa == 1 - 2.0**-24:
        return ""
    return f"_quotient({operand}, {constant(value, dtype)}, {constant(inverse, dtype)})"
