"""One element of a tensor as values of a score program: followed back through pointwise operators,
views and aranges to index arithmetic and to tensors that are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.held import held
from iocompiler.graph.patterns import HIDES, Band, Hiding
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.arrange import Frame
from iocompiler.passes.attention.dims.axes import (
    Axis,
    Dims,
    Group,
    expression,
    index,
    known,
    resolve,
    size,
)
from iocompiler.passes.attention.masks.evaluate import Evaluator
from iocompiler.passes.attention.masks.places import At, ends, filled, moved, whole, zero
from iocompiler.passes.attention.masks.values import Bounds, magnitude
from iocompiler.passes.attention.programs.distances import Distances, by_distance
from iocompiler.passes.attention.programs.element_rules import RULES, NotExpressed
from iocompiler.passes.attention.reading.description import Attention, Declined
from iocompiler.passes.attention.reading.scores import constant, number
from iocompiler.tile.score import ScoreBuilder, Type

aten = torch.ops.aten
_DEEPEST = 60
_MOST_NEGATIVE = -1e30  # what a finite number is raised to, so that times log2(e) it stays finite
LARGEST = 1e4  # no learned bias is larger


@dataclass(frozen=True)
class Loaded:
    """An operand of the program: a tensor and its dims."""

    node: Node
    dims: Dims


Source: TypeAlias = Loaded | Distances


class Elements:
    """Extracts elements of the tensors around one attention into one program.

    Attributes:
        build: the program.
        sources: the operands it loads, in order.
        numbers: the axes whose sizes are its run-time integers, in order.
    """

    def __init__(self, found: Attention, evaluator: Evaluator) -> None:
        self.build = ScoreBuilder()
        self.sources: list[Source] = []
        self.numbers: list[Axis] = []
        self.frame = Frame(found)
        self._found = found
        self.evaluator = evaluator
        self._axes = [*found.rows, found.column]
        self.bounds: Bounds = {axis.index: expression(axis.size) for axis in self._axes}
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
        marks = (len(self.sources), len(self.build.ops))
        self._depth += 1
        try:
            if self._depth > _DEEPEST:
                raise NotExpressed
            found = self._walked(node, at)
        except NotExpressed:
            found = None
        self._depth -= 1
        read_more = len(self.sources) > marks[0] or any(
            op.kind == "load" for op in self.build.ops[marks[1] :]
        )
        if found is None or (read_more and not self._is_tile(at)):
            del self.sources[marks[0] :]
            return self._load(node, at)  # a row or a column is cheaper made outside
        return found

    def _is_tile(self, at: At) -> bool:
        """Whether the place depends on the row and on the column."""
        free = set().union(*(each.free_symbols for each in at)) if at else set()
        row = self._found.row
        return self._found.column.index in free and row is not None and row.index in free

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
            return self.integer(found)
        value = number(node)
        if value is None:
            raise NotExpressed
        return self.build.const(value)

    def _walked(self, node: Node, at: At) -> int:
        if node.op != "call_function":
            return self._held(node, at)
        if node.target in views.COPIES:
            return self.value(node.args[0], at)
        if node.target in views.CASTS:
            return self.cast(self.value(node.args[0], at), views.dtype(node))
        place = moved(node, at, self.bounds)
        if place is not None:
            return self.value(node.args[0], place)
        if node.target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
            return self.cast(self._arange(node, at), views.dtype(node))
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
                inside = build.map("and", inside, self._not_negative(end))
            if views.dtype(node) == torch.bool:
                return inside if found.inside else build.map("logical_not", inside)
            return build.map("where", inside, build.const(found.inside), build.const(found.outside))
        if isinstance(found, Hiding):
            loaded = self._as_is(node, at)
            kept = build.map("gt", loaded, build.const(HIDES))
            other = loaded if found.bound else build.const(0.0)
            return build.map("where", kept, other, build.const(found.value))
        raise NotExpressed

    def _arange(self, node: Node, at: At) -> int:
        values = [whole(each) for each in node.args]
        if any(each is None for each in values):
            raise NotExpressed
        start = values[0] if len(values) > 1 else sympy.Integer(0)
        step = values[2] if len(values) > 2 else sympy.Integer(1)
        return self.integer(sympy.expand(start + step * at[0]))

    # loads

    def _load(self, node: Node, at: At) -> int:
        return self.finite(self._as_is(node, at), node, at)

    def _as_is(self, node: Node, at: At) -> int:
        row, column = self._found.row, self._found.column
        distances = by_distance(node, at, row, column, self.evaluator, self.bounds)
        if distances is not None and self._is_head(at, distances.head):
            return self._loaded(distances, views.dtype(node))
        groups = tuple(self._group(x, n) for x, n in zip(at, views.shape(node), strict=True))
        return self._loaded(Loaded(node, groups), views.dtype(node))

    def _is_head(self, at: At, dim: int | None) -> bool:
        return dim is None or sympy.expand(index(self.frame.heads) - at[dim]) == 0

    def _loaded(self, source: Source, dtype: torch.dtype) -> int:
        if source not in self.sources:
            self.sources.append(source)
        place = self.sources.index(source)
        type_: Type = "float" if dtype.is_floating_point else "int"
        if dtype == torch.bool:
            type_ = "bool"
        if isinstance(source, Distances):
            apart = self.build.map("sub", self.build.index("j"), self.build.index("i"))
            last = self.build.map("sub", self._number(source.row), self.build.const(1))
            head = self.build.index("h") if source.head is not None else self.build.const(0)
            subscripts = [head, self.build.map("add", apart, last)]
            return self.build.load(place, subscripts, type_)
        present = {axis for group in source.dims for axis in resolve(group)}
        names = zip("bhij", self.frame.scores, strict=True)
        zero_ = self.build.const(0)
        subscripts = [self.build.index(n) if present & set(g) else zero_ for n, g in names]
        return self.build.load(place, subscripts, type_)

    def finite(self, value: int, node: Node, at: At) -> int:
        """A loaded float whose finite values stay finite when multiplied by log2(e)."""
        if self.build.type(value) != "float":
            return value
        found = self.evaluator.element(node, at, self.bounds)
        if getattr(found, "bound", LARGEST + 1) <= LARGEST or _is_learned(node):
            return value
        lowest = self.build.map("maximum", value, self.build.const(_MOST_NEGATIVE))
        infinite = self.build.map("eq", value, self.build.const(float("-inf")))
        return self.build.map("where", infinite, value, lowest)

    def _group(self, place: sympy.Expr, extent: Any) -> Group:
        """The axes whose index a place is."""
        if place == 0:
            if not known(extent == 1):
                raise NotExpressed
            return ()
        joined = (*self.frame.batch, *self.frame.heads)
        groups = [(axis,) for axis in self._axes]
        for group in (*groups, self.frame.batch, self.frame.heads, joined):
            if sympy.expand(index(group) - place) == 0 and known(size(group) == extent):
                return resolve(group)
        raise NotExpressed

    # integers

    def integer(self, expr: sympy.Expr) -> int:
        """An affine expression of indices and sizes."""
        total: int | None = None
        for term in sympy.Add.make_args(sympy.expand(expr)):
            part, negative = self._term(term)
            if total is None:
                zero_ = self.build.const(0)
                total = self.build.map("sub", zero_, part) if negative else part
            else:
                total = self.build.map("sub" if negative else "add", total, part)
        assert total is not None
        return total

    def _not_negative(self, expr: sympy.Expr) -> int:
        """Whether an affine expression is not negative, as a comparison of what is added in it."""
        terms = sympy.Add.make_args(sympy.expand(expr))
        below = [term for term in terms if term.could_extract_minus_sign()]
        above = [term for term in terms if term not in below]
        high, low = (
            self.integer(sum(each, sympy.Integer(0))) for each in (above, [-t for t in below])
        )
        return self.build.map("le", low, high)

    def _term(self, term: sympy.Expr) -> tuple[int, bool]:
        factor, rest = term.as_coeff_Mul()
        if not factor.is_Integer:
            raise NotExpressed
        value = self.build.const(abs(int(factor)))
        if rest != 1:
            for each in sympy.Mul.make_args(rest):
                value = self.build.map("mul", self._symbol(each), value)
        return value, bool(factor < 0)

    def _symbol(self, symbol: sympy.Expr) -> int:
        for axis in self._axes:
            if axis.index == symbol:
                return self._axis(axis)
        for axis in self._axes:
            if expression(axis.size) == symbol:
                return self._number(axis)
        raise NotExpressed

    def _axis(self, axis: Axis) -> int:
        """The index along an axis: b, h, i or j, or a part of b or of h."""
        for name, group in zip("bhij", self.frame.scores, strict=True):
            if axis in group:
                value = self.build.index(name)
                inner = group[group.index(axis) + 1 :]
                for each in inner:
                    value = self.build.map("int_trunc_div", value, self._number(each))
                if axis is group[0]:
                    return value
                return self.build.map("int_trunc_mod", value, self._number(axis))
        raise NotExpressed

    def _number(self, axis: Axis) -> int:
        """The size of an axis."""
        if isinstance(axis.size, int):
            return self.build.const(axis.size)
        if axis not in self.numbers:
            self.numbers.append(axis)
        return self.build.number(self.numbers.index(axis))

    # for the rules

    def operand(self, node: Any, at: At) -> int:
        """The element of a broadcast operand."""
        if not isinstance(node, Node) or not isinstance(view.value(node), torch.Tensor):
            return self.value(node, ())
        shape = views.shape(node)
        last = at[len(at) - len(shape) :]
        return self.value(node, tuple(zero(n, x) for n, x in zip(shape, last, strict=True)))

    def cast(self, value: int, dtype: torch.dtype) -> int:
        """Converted; between floats nothing is rounded."""
        if dtype == torch.bool:
            return self.build.cast(value, "bool")
        if self.build.type(value) == "bool":
            one, none = (1.0, 0.0) if dtype.is_floating_point else (1, 0)
            return self.build.map("where", value, self.build.const(one), self.build.const(none))
        return self.build.cast(value, "float" if dtype.is_floating_point else "int")


def _is_learned(node: Node) -> bool:
    return bool(getattr(view.value(node), "requires_grad", False))


def reach(node: Node, at: At, evaluator: Evaluator, bounds: Bounds) -> float:
    """What no element of a tensor exceeds, either way; of learned numbers, seen through views and
    casts, the largest there are.
    """
    root: Any = node
    while root.op == "call_function" and root.target in (*views.VIEWS, *views.CASTS):
        root = root.args[0]
    if root.meta.get("parameter") or root.meta.get("requires_grad") or _is_learned(root):
        return LARGEST
    return magnitude(evaluator.element(node, at, bounds))
