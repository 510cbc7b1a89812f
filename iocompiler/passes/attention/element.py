"""One element of a tensor as values of a score program: followed back through pointwise operators,
views and aranges to index arithmetic and to tensors that are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.passes.attention import views
from iocompiler.passes.attention.arrange import Frame
from iocompiler.passes.attention.axes import (
    Axis,
    Dims,
    Group,
    expression,
    index,
    known,
    resolve,
    size,
)
from iocompiler.passes.attention.description import Attention, Declined
from iocompiler.passes.attention.distances import Distances, by_distance
from iocompiler.passes.attention.evaluate import Evaluator
from iocompiler.passes.attention.places import At, filled, moved, whole, zero
from iocompiler.passes.attention.scores import constant, number
from iocompiler.passes.attention.values import Bounds
from iocompiler.tile.score import ScoreBuilder, Type

aten = torch.ops.aten
_DEEPEST = 60
_MOST_NEGATIVE = -1e30  # what a finite number is raised to, so that times log2(e) it stays finite
_LARGEST = 1e4  # no learned bias is larger
_SAME = (
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.to.device,
)
_CONVERTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)


@dataclass(frozen=True)
class Loaded:
    """An operand of the program: a tensor and its dims."""

    node: Node
    dims: Dims


Source: TypeAlias = Loaded | Distances


class NotExpressed(Exception):
    """An element is not what a program can say: it is loaded, if not itself, then what reads it."""


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
            return self._literal(node, literal)
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

    def _literal(self, node: Any, literal: float) -> int:
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
            raise NotExpressed
        if node.target in _SAME:
            return self.value(node.args[0], at)
        if node.target in _CONVERTS:
            return self.cast(self.value(node.args[0], at), views.dtype(node))
        place = moved(node, at, self.bounds)
        if place is not None:
            return self.value(node.args[0], place)
        if node.target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
            return self.cast(self._arange(node, at), views.dtype(node))
        made = filled(node)
        if made is not None:
            return self._literal(node, made.value)  # type: ignore[union-attr]
        name = str(getattr(node.target, "_opname", node.target))
        rule = RULES.get(name)
        if rule is None:
            raise NotExpressed
        return rule(self, node, at)

    def _arange(self, node: Node, at: At) -> int:
        values = [whole(each) for each in node.args]
        if any(each is None for each in values):
            raise NotExpressed
        start = values[0] if len(values) > 1 else sympy.Integer(0)
        step = values[2] if len(values) > 2 else sympy.Integer(1)
        return self.integer(sympy.expand(start + step * at[0]))

    # loads

    def _load(self, node: Node, at: At) -> int:
        row, column = self._found.row, self._found.column
        distances = by_distance(node, at, row, column, self.evaluator, self.bounds)
        if distances is not None and self._is_head(at, distances.head):
            return self.finite(self._loaded(distances, views.dtype(node)), node, at)
        groups = tuple(self._group(x, n) for x, n in zip(at, views.shape(node), strict=True))
        source = Loaded(node, groups)
        return self.finite(self._loaded(source, views.dtype(node)), node, at)

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
        if getattr(found, "bound", _LARGEST + 1) <= _LARGEST or _is_learned(node):
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


Rule: TypeAlias = Callable[[Elements, Node, At], int]


def _arguments(node: Node, count: int) -> Sequence[Any]:
    if len(node.args) < count:
        raise NotExpressed
    return node.args[:count]


def _unary(fn: str) -> Rule:
    def rule(elements: Elements, node: Node, at: At) -> int:
        value = elements.operand(node.args[0], at)
        if elements.build.type(value) != "float" and fn not in ("neg", "abs"):
            value = elements.build.cast(value, "float")
        return elements.build.map(fn, value)

    return rule


def apply(elements: Elements, fn: str, left: int, right: int) -> int:
    """Arithmetic, done in both branches of a choice between literals."""
    build = elements.build
    for place, (one, other) in enumerate(((left, right), (right, left))):
        op = build.ops[one]
        literals = op.fn == "where" and all(build.literal(x) is not None for x in op.inputs[1:])
        if literals and build.literal(other) is not None:
            parts = [
                build.map(fn, *((each, other) if place == 0 else (other, each)))
                for each in op.inputs[1:]
            ]
            return build.map("where", op.inputs[0], *parts)
    return build.map(fn, left, right)


def _binary(fn: str) -> Rule:
    def rule(elements: Elements, node: Node, at: At) -> int:
        left, right = (elements.operand(each, at) for each in _arguments(node, 2))
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if not isinstance(alpha, (int, float)) or node.kwargs.get("rounding_mode") is not None:
            raise NotExpressed
        if fn == "div":
            left, right = (elements.build.cast(each, "float") for each in (left, right))
        if alpha != 1:
            right = apply(elements, "mul", right, elements.build.const(alpha))
        if elements.build.type(left) == elements.build.type(right) == "bool":
            if fn not in ("mul", "add"):
                raise NotExpressed
            return elements.build.map("and" if fn == "mul" else "or", left, right)
        return apply(elements, fn, left, right)

    return rule


def _reversed(elements: Elements, node: Node, at: At) -> int:
    left, right = (elements.operand(each, at) for each in _arguments(node, 2))
    if len(node.args) > 2 or node.kwargs:
        raise NotExpressed
    return apply(elements, "sub", right, left)


def _comparison(fn: str) -> Rule:
    def rule(elements: Elements, node: Node, at: At) -> int:
        left, right = (elements.operand(each, at) for each in _arguments(node, 2))
        if elements.build.ops[left].fn == "where" and elements.build.literal(right) is not None:
            return _chosen(elements, fn, left, right)
        return elements.build.map(fn, left, right)

    return rule


def _chosen(elements: Elements, fn: str, left: int, right: int) -> int:
    """A comparison of a choice between literals: the condition, its opposite, or the same all
    over.
    """
    build = elements.build
    condition, *branches = build.ops[left].inputs
    results = [build.literal(build.map(fn, each, right)) for each in branches]
    if any(not isinstance(each, bool) for each in results):
        return build.map(fn, left, right)
    if results[0] == results[1]:
        return build.const(bool(results[0]))
    return condition if results[0] else build.map("logical_not", condition)


def _logic(fn: str) -> Rule:
    def rule(elements: Elements, node: Node, at: At) -> int:
        if views.dtype(node) != torch.bool:
            raise NotExpressed
        values = [elements.build.cast(elements.operand(x, at), "bool") for x in node.args]
        return elements.build.map(fn, *values)

    return rule


def _clamp(elements: Elements, node: Node, at: At) -> int:
    value = elements.operand(node.args[0], at)
    given = [*node.args[1:], None, None][:2]
    low, high = (
        given[0] if given[0] is not None else node.kwargs.get("min"),
        given[1] if given[1] is not None else node.kwargs.get("max"),
    )
    for bound, fn in ((low, "maximum"), (high, "minimum")):
        if bound is not None:
            value = elements.build.map(fn, value, elements.operand(bound, at))
    return value


def _bound(fn: str) -> Rule:
    def rule(elements: Elements, node: Node, at: At) -> int:
        bound = elements.operand(_arguments(node, 2)[1], at)
        return elements.build.map(fn, elements.operand(node.args[0], at), bound)

    return rule


def _relu(elements: Elements, node: Node, at: At) -> int:
    value = elements.operand(node.args[0], at)
    return elements.build.map("maximum", value, elements.build.const(0.0))


def _power(elements: Elements, node: Node, at: At) -> int:
    if node.args[1] != 2:
        raise NotExpressed
    value = elements.operand(node.args[0], at)
    return elements.build.map("mul", value, value)


def _where(elements: Elements, node: Node, at: At) -> int:
    condition, then, other = (elements.operand(each, at) for each in _arguments(node, 3))
    build = elements.build
    if all(build.type(each) == "bool" for each in (then, other)):
        kept = build.map("and", condition, then)
        return build.map("or", kept, build.map("and", build.map("logical_not", condition), other))
    return build.map("where", build.cast(condition, "bool"), then, other)


def _masked_fill(elements: Elements, node: Node, at: At) -> int:
    source, condition, value = (elements.operand(each, at) for each in _arguments(node, 3))
    value = elements.cast(value, views.dtype(node))
    return elements.build.map("where", condition, value, source)


def _triangle(sign: int) -> Rule:
    def rule(elements: Elements, node: Node, at: At) -> int:
        diagonal = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
        inside = whole(diagonal)
        if inside is None:
            raise NotExpressed
        i, j = (elements.integer(at[place]) for place in (-2, -1))
        offset = elements.integer(inside)
        i = elements.build.map("add", i, offset)
        kept = elements.build.map("le" if sign > 0 else "ge", j, i)
        value = elements.value(node.args[0], at)
        if elements.build.type(value) == "bool":
            return elements.build.map("and", kept, value)
        none = elements._literal(node, 0.0)
        return elements.build.map("where", kept, value, none)

    return rule


RULES: dict[str, Rule] = {
    **{name: _unary(name) for name in ("neg", "abs", "exp", "tanh", "sigmoid", "sqrt", "log")},
    **{name: _binary(name) for name in ("add", "sub", "mul", "div")},
    **{name: _comparison(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{name: _logic("and") for name in ("logical_and", "bitwise_and", "__and__")},
    **{name: _logic("or") for name in ("logical_or", "bitwise_or", "__or__")},
    **{name: _logic("logical_not") for name in ("logical_not", "bitwise_not")},
    "rsub": _reversed,
    "clamp": _clamp,
    "clamp_min": _bound("maximum"),
    "clamp_max": _bound("minimum"),
    "maximum": _bound("maximum"),
    "minimum": _bound("minimum"),
    "relu": _relu,
    "pow": _power,
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangle(1),
    "triu": _triangle(-1),
}
"""Operators by name."""
