"""Rows and columns of scores parted in two, i // n and i % n, as the pixels of an image are into
its rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from iocompiler.graph.sizes import known
from iocompiler.passes.attention.dims.axes import Axis, Group, expression


@dataclass(frozen=True)
class Parting:
    """The axis ``whole`` as one of ``outer`` and one of ``inner``."""

    whole: Axis
    outer: Axis
    inner: Axis


class Partings:
    """What single axes were parted into.

    Attributes:
        bounds: the size of each index, those of parts too.
    """

    def __init__(self, axes: Sequence[Axis], bounds: dict[sympy.Symbol, sympy.Expr]) -> None:
        self._axes, self.bounds = axes, bounds
        self._made: list[Parting] = []

    def part(self, at: sympy.Expr, outer: Any, inner: Any) -> tuple[sympy.Expr, sympy.Expr] | None:
        """The places along the two parts of the axis that ``at`` is the index of."""
        axis = next((each for each in self._axes if each.index == at), None)
        if axis is None or not isinstance(outer, int) or not isinstance(inner, int):
            return None
        if not known(axis.size == outer * inner):
            return None
        for found in self._made:
            if found.whole is axis and found.inner.size == inner:
                return found.outer.index, found.inner.index
        made = Parting(axis, Axis(outer), Axis(inner))
        self._made.append(made)
        for each in (made.outer, made.inner):
            self.bounds[each.index] = expression(each.size)
        return made.outer.index, made.inner.index

    def of(self, place: sympy.Expr) -> tuple[Parting, Axis] | None:
        """The part that a place is the index of, and what was parted."""
        for found in self._made:
            for axis in (found.outer, found.inner):
                if axis.index == place:
                    return found, axis
        return None

    def joined(self, place: sympy.Expr) -> sympy.Expr:
        """The place, parts that are together again written as the axis they are."""
        for found in self._made:
            times = sympy.expand(place).coeff(found.inner.index, 1)
            pair = found.inner.size * found.outer.index + found.inner.index
            if times != 0 and sympy.expand(place).coeff(found.outer.index, 1) == (
                times * found.inner.size
            ):
                place = sympy.expand(place - times * pair + times * found.whole.index)
        return place

    def has_all(self, axis: Axis, free: set[sympy.Symbol]) -> bool:
        """Whether indices tell every place along an axis apart."""
        return axis.index in free or any(
            found.whole is axis and {found.outer.index, found.inner.index} <= free
            for found in self._made
        )

    def has_any(self, axis: Axis, free: set[sympy.Symbol]) -> bool:
        """Whether indices tell any places along an axis apart."""
        return axis.index in free or any(
            found.whole is axis and {found.outer.index, found.inner.index} & free
            for found in self._made
        )

    def group(self, axis: Axis, present: set[Axis]) -> Group:
        """An axis, or its parts where these are among those ``present``."""
        for found in self._made:
            if found.whole is axis and {found.outer, found.inner} & present:
                return (found.outer, found.inner)
        return (axis,)
