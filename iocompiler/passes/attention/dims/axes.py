"""Axes: what the dims of a tensor mean, whatever views brought them there.

A tensor's dims are written as groups of axes: [B * H, S, D] of a bmm is ((b, h), (s,), (d,)). Axes
of size 1 carry no information and are left out: their group is empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from math import prod
from typing import Any, TypeAlias

import sympy
import torch

from iocompiler.graph.sizes import known


class Axis:
    """One index of the computation, of a size known or symbolic; may turn out to be a product of
    others.
    """

    def __init__(self, size: Any) -> None:
        self.size = size
        self.parts: tuple[Axis, ...] | None = None

    def split(self, outer: Any) -> tuple[Axis, Axis]:
        """Make this axis the product of one of size ``outer`` and the rest, and return both."""
        self.parts = (Axis(outer), Axis(self.size // outer))
        return self.parts[0], self.parts[1]

    @cached_property
    def index(self) -> sympy.Symbol:
        return sympy.Dummy("x", integer=True, nonnegative=True)


Group: TypeAlias = tuple[Axis, ...]
Dims: TypeAlias = tuple[Group, ...]


def fresh(shape: Iterable[Any]) -> Dims:
    """A new axis for each dim."""
    return tuple((Axis(size),) for size in shape)


def resolve(group: Iterable[Axis]) -> Group:
    """The group in axes that are no products and not of size 1."""
    found: list[Axis] = []
    for axis in group:
        if axis.parts is not None:
            found += resolve(axis.parts)
        elif not known(axis.size == 1):
            found.append(axis)
    return tuple(found)


def resolved(dims: Iterable[Group]) -> Dims:
    return tuple(resolve(group) for group in dims)


def flat(dims: Iterable[Group]) -> Group:
    """All axes of the dims, in order."""
    return tuple(axis for group in dims for axis in resolve(group))


def size(group: Iterable[Axis]) -> Any:
    return prod(axis.size for axis in resolve(group))


def regroup(dims: Sequence[Group], shape: Sequence[Any]) -> Dims | None:
    """The dims after (or before) a reshape to ``shape``, splitting axes where it does; None where
    it cannot be said.
    """
    waiting = list(reversed(flat(dims)))
    groups: list[Group] = []
    for target in shape:
        group: list[Axis] = []
        have: Any = 1
        while not known(have == target):
            if not waiting or known(target == 0):
                return None
            axis = waiting.pop()
            if not _divides(target, have * axis.size):
                rest = target // have
                if not _divides(target, have) or not _divides(axis.size, rest):
                    return None
                axis, remaining = axis.split(rest)
                waiting.append(remaining)
            group.append(axis)
            have = have * axis.size
        groups.append(tuple(group))
    return None if waiting else tuple(groups)


def broadcast(dims: Dims, shape: Sequence[Any]) -> Dims | None:
    """The dims of a tensor of ``shape`` that is broadcast against one of ``dims``; None where it
    would widen it.
    """
    if len(shape) > len(dims):
        return None
    against = dims[len(dims) - len(shape) :]
    groups: list[Group] = []
    for group, extent in zip(against, shape, strict=True):
        if known(extent == 1):
            groups.append(())
        elif known(extent == size(group)):
            groups.append(resolve(group))
        else:
            return None
    return tuple(groups)


def expression(extent: Any) -> sympy.Expr:
    """A size as a sympy expression."""
    return extent.node.expr if isinstance(extent, torch.SymInt) else sympy.Integer(extent)


def index(group: Iterable[Axis]) -> sympy.Expr:
    """The index along a dim, in the indices of its axes."""
    position: sympy.Expr = sympy.Integer(0)
    for axis in resolve(group):
        position = position * expression(axis.size) + axis.index
    return position


def indices(dims: Iterable[Group]) -> tuple[sympy.Expr, ...]:
    """`index` along each dim."""
    return tuple(index(group) for group in dims)


def extents(axes: Iterable[Axis]) -> dict[sympy.Symbol, sympy.Expr]:
    """For the index along each axis, its size."""
    return {axis.index: expression(axis.size) for axis in axes}


def _divides(whole: Any, part: Any) -> bool:
    if isinstance(whole, int) and isinstance(part, int):
        return part != 0 and whole % part == 0
    return known((whole // part) * part == whole)
