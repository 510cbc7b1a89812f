"""Affine index expressions over the axes of a tile program.

Every address a tile program computes is ``const + sum(coefficient * term)``. A term is the
name of an axis (``"x0"``) or of an integer value computed by the program (``"%7"``, an indirect
index). Views never leave this form: what would need a division splits an axis instead (see
``plan/views.py``), so no index carries ``//`` or ``%``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import sympy

Size: TypeAlias = "int | sympy.Expr"


@dataclass(frozen=True)
class Axis:
    """One dimension of an iteration space: ``0 <= name < size``."""

    name: str
    size: Size


@dataclass(frozen=True)
class Affine:
    """``const + sum(coefficient * name)``, terms sorted by name, no zero coefficient."""

    terms: tuple[tuple[str, Size], ...] = ()
    const: Size = 0

    @staticmethod
    def of(name: str) -> Affine:
        return Affine(((name, 1),))

    @staticmethod
    def constant(value: Size) -> Affine:
        return Affine((), value)

    @staticmethod
    def build(terms: Mapping[str, Size], const: Size = 0) -> Affine:
        return Affine(tuple(sorted((n, c) for n, c in terms.items() if c != 0)), const)

    def __add__(self, other: Affine | Size) -> Affine:
        if not isinstance(other, Affine):
            return Affine(self.terms, self.const + other)
        if not other.terms:
            return Affine(self.terms, self.const + other.const)
        merged = dict(self.terms)
        for name, coefficient in other.terms:
            merged[name] = merged.get(name, 0) + coefficient
        return Affine.build(merged, self.const + other.const)

    def __sub__(self, other: Affine | Size) -> Affine:
        return self + (other * -1 if isinstance(other, Affine) else -other)

    def __mul__(self, factor: Size) -> Affine:
        if factor == 1:
            return self
        if factor == 0:
            return Affine()
        return Affine(tuple((n, c * factor) for n, c in self.terms), self.const * factor)

    def coefficient(self, name: str) -> Size:
        return next((c for n, c in self.terms if n == name), 0)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(n for n, _ in self.terms)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes this index varies over by itself."""
        return tuple(n for n in self.names if not n.startswith("%"))

    @property
    def values(self) -> tuple[int, ...]:
        """Positions of the program's own values this index reads (indirect indexing)."""
        return tuple(int(n[1:]) for n in self.names if n.startswith("%"))

    def substitute(self, replacement: Mapping[str, Affine]) -> Affine:
        """Replace names by affine expressions, all at once."""
        if not any(n in replacement for n, _ in self.terms):
            return self
        result = Affine((), self.const)
        for name, coefficient in self.terms:
            result = result + replacement.get(name, Affine.of(name)) * coefficient
        return result

    def __str__(self) -> str:
        parts = [n if c == 1 else f"{n}*{c}" for n, c in self.terms]
        if self.const != 0 or not parts:
            parts.append(str(self.const))
        return " + ".join(parts)


def product(sizes: tuple[Size, ...] | list[Size]) -> Size:
    """The number of points of a space with these sizes; 1 for none."""
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


def row_major(axes: tuple[Axis, ...]) -> Affine:
    """The row-major position of a point of the space these axes span."""
    index = Affine()
    stride: Size = 1
    for axis in reversed(axes):
        index = index + Affine.of(axis.name) * stride
        stride = stride * axis.size
    return index


def ceil_div(size: Size, block: int) -> Size:
    """How many blocks cover a size."""
    if isinstance(size, int):
        return -(-size // block)
    return size if block == 1 else sympy.floor((size + block - 1) / block)


def power_of_two(size: int) -> int:
    """The smallest power of two not below a size."""
    return 1 << max(size - 1, 0).bit_length()
