"""Integers of a score program: affine expressions of the indices of a score and of sizes."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from iocompiler.passes.attention.dims.axes import Axis, expression
from iocompiler.passes.attention.programs.partings import Partings
from iocompiler.passes.attention.reading.frame import Frame
from iocompiler.tile.score_builder import ScoreBuilder


class NotExpressed(Exception):
    """An element is not what a program can say: it is loaded, if not itself, then what reads it."""


class Integers:
    """Writes affine expressions into the program ``build``.

    Attributes:
        partings: what rows and columns were parted into.
        numbers: the axes whose sizes are its run-time integers, in order.
    """

    def __init__(
        self, build: ScoreBuilder, frame: Frame, axes: Sequence[Axis], partings: Partings
    ) -> None:
        self.partings = partings
        self._build, self._frame, self._axes = build, frame, axes
        self.numbers: list[Axis] = []

    def affine(self, expr: sympy.Expr) -> int:
        """The value of an affine expression."""
        total: int | None = None
        for term in sympy.Add.make_args(sympy.expand(expr)):
            part, negative = self._term(term)
            if total is None:
                zero = self._build.const(0)
                total = self._build.map("sub", zero, part) if negative else part
            else:
                total = self._build.map("sub" if negative else "add", total, part)
        assert total is not None
        return total

    def not_negative(self, expr: sympy.Expr) -> int:
        """Whether an affine expression is not negative, as a comparison of what is added in it."""
        terms = sympy.Add.make_args(sympy.expand(expr))
        below = [term for term in terms if term.could_extract_minus_sign()]
        above = [term for term in terms if term not in below]
        high, low = (
            self.affine(sum(each, sympy.Integer(0))) for each in (above, [-t for t in below])
        )
        return self._build.map("le", low, high)

    def _term(self, term: sympy.Expr) -> tuple[int, bool]:
        factor, rest = term.as_coeff_Mul()
        if not factor.is_Integer:
            raise NotExpressed
        value = self._build.const(abs(int(factor)))
        if rest != 1:
            for each in sympy.Mul.make_args(rest):
                value = self._build.map("mul", self._symbol(each), value)
        return value, bool(factor < 0)

    def _symbol(self, symbol: sympy.Expr) -> int:
        for axis in self._axes:
            if axis.index == symbol:
                return self._axis(axis)
        for axis in self._axes:
            if expression(axis.size) == symbol:
                return self.number(axis)
        part = self.partings.of(symbol)
        if part is None:
            raise NotExpressed
        found, axis = part
        name = "int_trunc_div" if axis is found.outer else "int_trunc_mod"
        return self._build.map(name, self._axis(found.whole), self.number(found.inner))

    def _axis(self, axis: Axis) -> int:
        """The index along an axis: b, h, i or j, or a part of b or of h."""
        for name, group in zip("bhij", self._frame.scores, strict=True):
            if axis in group:
                value = self._build.index(name)
                inner = group[group.index(axis) + 1 :]
                for each in inner:
                    value = self._build.map("int_trunc_div", value, self.number(each))
                if axis is group[0]:
                    return value
                return self._build.map("int_trunc_mod", value, self.number(axis))
        raise NotExpressed

    def number(self, axis: Axis) -> int:
        """The size of an axis."""
        if isinstance(axis.size, int):
            return self._build.const(axis.size)
        if axis not in self.numbers:
            self.numbers.append(axis)
        return self._build.number(self.numbers.index(axis))
