"""One element of a tensor as values of a score program: followed back through pointwise operators,
views and aranges to index arithmetic and to tensors that are loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.held import held
from iocompiler.graph.patterns import HIDES, Band, Hiding
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import extents
from iocompiler.passes.attention.masks.evaluate import Evaluator
from iocompiler.passes.attention.masks.places import (
    ARANGES,
    At,
    arange,
    ends,
    filled,
    moved,
    of_operand,
    whole,
)
from iocompiler.passes.attention.programs.element_rules import RULES
from iocompiler.passes.attention.programs.integers import Integers, NotExpressed
from iocompiler.passes.attention.programs.loads import Loads
from iocompiler.passes.attention.programs.partings import Partings
from iocompiler.passes.attention.reading.constants import constant, number
from iocompiler.passes.attention.reading.description import Attention, Declined
from iocompiler.passes.attention.reading.frame import Frame
from iocompiler.tile.score_builder import ScoreBuilder

_DEEPEST = 60


class Elements:
    """Extracts elements of the tensors around one attention into one program.

    Attributes:
        build: the program.
        integers, loads: what writes those of it.
        bounds: the size of each index.
    """

    def __init__(self, found: Attention, evaluator: Evaluator) -> None:
        self.build, self.evaluator = ScoreBuilder(), evaluator
        frame, axes = Frame(found), [*found.rows, found.column]
        self.bounds = extents(axes)
        self.partings = Partings(
            [a for a in (found.row, found.column) if a is not None], self.bounds
        )
        self.integers = Integers(self.build, frame, axes, self.partings)
        self.loads = Loads(self.build, self.integers, frame, found, evaluator)
        self._found = found
        self._depth = 0

    def value(self, node: Any, at: At) -> int:
        """The element of ``node`` at these indices.

        Raises:
            NotExpressed: no program says it.
        """
        literal = node if isinstance(node, (bool, int, float)) else constant(node)
        if literal is not None:
            return self.literal(node, literal)
        if not isinstance(node, Node):
            raise NotExpressed
        if not isinstance(view.value(node), torch.Tensor):
            return self._scalar(node)
        if self.evaluator.is_written(node):
            raise Declined(f"{node.name} is written in place")
        marks = (len(self.loads.sources), len(self.build.ops))
        self._depth += 1
        try:
            if self._depth > _DEEPEST:
                raise NotExpressed
            found = self._walked(node, at)
        except NotExpressed:
            found = None
        self._depth -= 1
        read_more = len(self.loads.sources) > marks[0] or any(
            op.kind == "load" for op in self.build.ops[marks[1] :]
        )
        if found is None or (read_more and not self._is_tile(at)):
            del self.loads.sources[marks[0] :]
            known = self.decided(node, at) if views.dtype(node) == torch.bool else None
            if known is not None:
                return self.build.const(known)
            return self.loads.finite(node, at)  # a row or a column is cheaper made outside
        return found

    def _is_tile(self, at: At) -> bool:
        """Whether the place depends on the row and on the column."""
        free = set().union(*(each.free_symbols for each in at)) if at else set()
        row, tells = self._found.row, self.partings
        return (
            row is not None and tells.has_any(row, free) and tells.has_all(self._found.column, free)
        )

    def literal(self, node: Any, literal: float) -> int:
        if isinstance(node, Node):
            dtype = views.dtype(node)
            if dtype == torch.bool:
                return self.build.const(bool(literal))
            return self.build.const(float(literal) if dtype.is_floating_point else int(literal))
        return self.build.const(node)

    def _scalar(self, node: Node) -> int:
        found = whole(node)
        if found is not None:
            return self.integers.affine(found)
        value = number(node)
        if value is None:
            raise NotExpressed
        return self.build.const(value)

    def _walked(self, node: Node, at: At) -> int:
        if node.op != "call_function":
            return self._held(node, at)
        if node.target in views.COPIES:
            if self.evaluator.is_snapshot(node):
                raise NotExpressed
            return self.value(node.args[0], at)
        if node.target in views.CASTS:
            return self.cast(self.value(node.args[0], at), views.dtype(node))
        place = moved(node, at, self.bounds, self.partings.part)
        if place is not None:
            return self.value(node.args[0], tuple(map(self.partings.joined, place)))
        if node.target in ARANGES:
            counted = arange(node, at)
            if counted is None:
                raise NotExpressed
            return self.cast(self.integers.affine(counted.expr), views.dtype(node))
        made = filled(node)
        if made is not None:
            return self.literal(node, made.value)  # type: ignore[union-attr]
        name = str(getattr(node.target, "_opname", node.target))
        rule = RULES.get(name)
        if rule is None:
            raise NotExpressed
        return rule(self, node, at)

    def _held(self, node: Node, at: At) -> int:
        """Of an input or a constant, as far as it is known what that holds."""
        found, build = held(node), self.build
        if isinstance(found, Band):
            inside = build.const(True)
            for end in ends(found, at):
                inside = build.map("and", inside, self.integers.not_negative(end))
            if views.dtype(node) == torch.bool:
                return inside if found.inside else build.map("logical_not", inside)
            return build.map("where", inside, build.const(found.inside), build.const(found.outside))
        if isinstance(found, Hiding):
            loaded = self.loads.as_is(node, at)
            kept = build.map("gt", loaded, build.const(HIDES))
            other = loaded if found.bound else build.const(0.0)
            return build.map("where", kept, other, build.const(found.value))
        raise NotExpressed

    def operand(self, node: Any, at: At) -> int:
        """The element of a broadcast operand."""
        return self.value(node, of_operand(node, at))

    def decided(self, node: Node, at: At) -> bool | None:
        """What a condition is at every score, where that is proved: of positions of one document,
        say, whose numbers a program would have to load.
        """
        found = self.evaluator.element(node, at, self.bounds)
        return found if isinstance(found, bool) else None

    def cast(self, value: int, dtype: torch.dtype) -> int:
        """Converted; between floats nothing is rounded."""
        if dtype == torch.bool:
            return self.build.cast(value, "bool")
        if self.build.type(value) == "bool":
            one, none = (1.0, 0.0) if dtype.is_floating_point else (1, 0)
            return self.build.map("where", value, self.build.const(one), self.build.const(none))
        return self.build.cast(value, "float" if dtype.is_floating_point else "int")
