"""What a score program loads: tensors in the layout of the scores, or one value a distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Node

from iocompiler.graph.sizes import known
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import Dims, Group, index, resolve, size
from iocompiler.passes.attention.masks.evaluate import Evaluator
from iocompiler.passes.attention.masks.limits import LARGEST, MOST_NEGATIVE, requires_grad
from iocompiler.passes.attention.masks.places import At
from iocompiler.passes.attention.masks.values import Bounds
from iocompiler.passes.attention.programs.distances import Distances, by_distance
from iocompiler.passes.attention.programs.integers import Integers, NotExpressed
from iocompiler.passes.attention.reading.description import Attention
from iocompiler.passes.attention.reading.frame import Frame
from iocompiler.tile.score import Type
from iocompiler.tile.score_builder import ScoreBuilder

_MOST_PARTS = 128
"""A tile of rows has the gradients of so many parts of the columns in registers."""


@dataclass(frozen=True)
class Loaded:
    """An operand of the program: a tensor and its dims; and, where it is told apart by a part of
    the columns alone, the row (or its parts) and that part.
    """

    node: Node
    dims: Dims
    parts: tuple[Group, Group] | None = None

    def layout(self, frame: Frame) -> Dims:
        """The dims it is loaded with."""
        return frame.scores if self.parts is None else (*frame.scores[:2], *self.parts)


Source: TypeAlias = Loaded | Distances


class Loads:
    """Writes loads into the program ``build``.

    Attributes:
        sources: the operands it loads, in order.
    """

    def __init__(
        self,
        build: ScoreBuilder,
        integers: Integers,
        frame: Frame,
        found: Attention,
        evaluator: Evaluator,
    ) -> None:
        self._build, self._integers, self._frame = build, integers, frame
        self._found, self._evaluator = found, evaluator
        self._axes = [*found.rows, found.column]
        self._bounds: Bounds = integers.partings.bounds
        self.sources: list[Source] = []

    def finite(self, node: Node, at: At) -> int:
        """The element loaded; its finite values stay finite when multiplied by log2(e)."""
        value = self.as_is(node, at)
        if self._build.type(value) != "float":
            return value
        found = self._evaluator.element(node, at, self._bounds)
        if getattr(found, "bound", LARGEST + 1) <= LARGEST or requires_grad(node):
            return value
        return self.raised(value)

    def raised(self, value: int) -> int:
        """A value whose finite values stay finite when multiplied by log2(e)."""
        lowest = self._build.map("maximum", value, self._build.const(MOST_NEGATIVE))
        infinite = self._build.map("eq", value, self._build.const(float("-inf")))
        return self._build.map("where", infinite, value, lowest)

    def as_is(self, node: Node, at: At) -> int:
        """The element loaded."""
        row, column = self._found.row, self._found.column
        distances = by_distance(node, at, row, column, self._evaluator)
        if distances is not None and self._is_head(at, distances.head):
            return self._loaded(distances, views.dtype(node))
        groups = tuple(self._group(x, n) for x, n in zip(at, views.shape(node), strict=True))
        return self._loaded(Loaded(node, groups, self._parts(groups)), views.dtype(node))

    def _parts(self, groups: Dims) -> tuple[Group, Group] | None:
        """The row, or its parts, and the one part of the column that are among the dims."""
        row, column, partings = self._found.row, self._found.column, self._integers.partings
        present = {axis for group in groups for axis in group}
        found = [part for axis in present if (part := partings.of(axis.index)) is not None]
        if not found:
            return None
        of_column = [axis for parting, axis in found if parting.whole is column]
        if row is None or len(of_column) != 1 or column in present:
            raise NotExpressed
        if of_column[0].size > _MOST_PARTS:
            raise NotExpressed
        of_row = partings.group(row, present)
        if (row in present) == (of_row != (row,)):
            raise NotExpressed  # of no rows, its gradient has no kernel
        return of_row, (of_column[0],)

    def _is_head(self, at: At, dim: int | None) -> bool:
        return dim is None or sympy.expand(index(self._frame.heads) - at[dim]) == 0

    def _loaded(self, source: Source, dtype: torch.dtype) -> int:
        if source not in self.sources:
            self.sources.append(source)
        place = self.sources.index(source)
        type_: Type = "float" if dtype.is_floating_point else "int"
        if dtype == torch.bool:
            type_ = "bool"
        if isinstance(source, Distances):
            apart = self._build.map("sub", self._build.index("j"), self._build.index("i"))
            last = self._build.map("sub", self._integers.number(source.row), self._build.const(1))
            head = self._build.index("h") if source.head is not None else self._build.const(0)
            subscripts = [head, self._build.map("add", apart, last)]
            return self._build.load(place, subscripts, type_)
        present = {axis for group in source.dims for axis in resolve(group)}
        names = zip("bhij", source.layout(self._frame), strict=True)
        zero = self._build.const(0)
        subscripts = [self._build.index(n) if present & set(g) else zero for n, g in names]
        if source.parts is not None:
            (part,) = source.parts[1]
            subscripts[3] = self._integers.affine(part.index)
        return self._build.load(place, subscripts, type_)

    def _group(self, place: sympy.Expr, extent: Any) -> Group:
        """The axes whose index a place is."""
        if place == 0:
            if not known(extent == 1):
                raise NotExpressed
            return ()
        part = self._integers.partings.of(place)
        if part is not None and known(part[1].size == extent):
            return (part[1],)
        joined = (*self._frame.batch, *self._frame.heads)
        groups = [(axis,) for axis in self._axes]
        for group in (*groups, self._frame.batch, self._frame.heads, joined):
            if sympy.expand(index(group) - place) == 0 and known(size(group) == extent):
                return resolve(group)
        raise NotExpressed
