"""One element of a tensor as a `Value`: arange arithmetic, comparisons and masks followed back through the graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import view
from iocompiler.passes.attention import views
from iocompiler.passes.attention.axes import expression, known
from iocompiler.passes.attention.scores import constant
from iocompiler.passes.attention.values import (
    FORMULAS,
    Bounds,
    Formula,
    Index,
    Number,
    Opaque,
    Select,
    Unknown,
    Value,
    at_least,
    both,
    either,
    extremes,
    negate,
    select,
)

aten = torch.ops.aten
At = tuple[sympy.Expr, ...]
_DEEPEST = 200
_SAME = (
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.detach_.default,
    aten.lift_fresh_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default,
)  # fmt: skip
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt, "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip
_AND = ("logical_and", "bitwise_and", "__and__")
_OR = ("logical_or", "bitwise_or", "__or__")
_NOT = ("logical_not", "bitwise_not")
_ARITHMETIC = ("add", "sub", "mul", "div", "rsub", "minimum", "maximum")
_MILD = ("abs", "neg", "log", "log2", "sqrt", "min", "max", "exp2", "tanh", "sigmoid", "floor", "clamp", "pow", "embedding")


class Evaluator:
    """Evaluates elements of the tensors of one graph."""

    def __init__(self, gm: GraphModule) -> None:
        written = {node for each in gm.graph.nodes for node in view.mutates(each) if each.target is not aten.detach_.default}
        roots = view.roots(gm) if written else {}
        self._written = frozenset().union(*(roots[node] for node in written)) if written else frozenset()
        self._roots = roots

    def element(self, node: Any, at: Sequence[sympy.Expr], bounds: Bounds) -> Value:
        """The element of ``node`` at these indices, whose sizes are ``bounds``."""
        return _Reading(self, bounds).value(node, tuple(at))

    def is_written(self, node: Node) -> bool:
        """Whether the storage of the node is written in place somewhere in the graph."""
        return bool(self._roots.get(node, frozenset()) & self._written)


class _Reading:
    def __init__(self, evaluator: Evaluator, bounds: Bounds) -> None:
        self._evaluator = evaluator
        self._bounds = dict(bounds)
        self._depth = 0

    def value(self, node: Any, at: At) -> Value:
        if isinstance(node, (bool, int, float)):
            return node if isinstance(node, bool) else Number(float(node))
        if not isinstance(node, Node):
            return Unknown()
        if not isinstance(view.value(node), torch.Tensor):
            return _scalar(node)
        if self._evaluator.is_written(node) or self._depth > _DEEPEST:
            return self._opaque(node, at)
        self._depth += 1
        found = self._call(node, at) if node.op == "call_function" else _attribute(node)
        self._depth -= 1
        if found is None or (views.dtype(node) == torch.bool and not isinstance(found, FORMULAS)):
            return self._opaque(node, at)
        return found

    def _opaque(self, node: Node, at: At, mild: bool = False) -> Value:
        if views.dtype(node) == torch.bool:
            return Opaque((node, at))
        return Unknown(mild)

    def _call(self, node: Node, at: At) -> Value | None:
        name = str(getattr(node.target, "_opname", node.target))
        if node.target in _SAME:
            return self._converted(node, self.value(node.args[0], at))
        moved = _moved(node, at)
        if moved is not None:
            return self.value(node.args[0], moved)
        if node.target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
            return _arange(node, at)
        filled = _filled(node)
        if filled is not None:
            return self._converted(node, filled)
        rule = getattr(self, f"_{name}", None)
        if rule is not None:
            result: Value | None = rule(node, at)
            return result
        if name in _COMPARISONS:
            return self._comparison(name, *self._operands(node, at))
        if name in _AND or name in _OR or name in _NOT:
            return self._logic(name, node, at)
        if name in _ARITHMETIC:
            return self._arithmetic(name, node, at)
        if name in _MILD:
            return self._mild(name, node, at)
        return None

    # conversions

    def _converted(self, node: Node, value: Value) -> Value:
        dtype = views.dtype(node)
        if dtype == torch.bool:
            return value if isinstance(value, FORMULAS) else self._comparison("ne", value, Number(0.0))
        if isinstance(value, FORMULAS):
            return select(value, Number(1.0), Number(0.0))
        if isinstance(value, Number) and not dtype.is_floating_point and not value.value.is_integer():
            return Number(float(math.trunc(value.value))) if math.isfinite(value.value) else Unknown()
        return value

    # operators

    def _operands(self, node: Node, at: At) -> tuple[Value, Value]:
        left, right = (self._operand(node, node.args[k], at) for k in (0, 1))
        return left, right

    def _operand(self, node: Node, operand: Any, at: At) -> Value:
        """The element of a broadcast operand."""
        if not isinstance(operand, Node) or not isinstance(view.value(operand), torch.Tensor):
            return self.value(operand, ())
        shape = views.shape(operand)
        last = at[len(at) - len(shape) :]
        return self.value(operand, tuple(_zero(n, x) for n, x in zip(shape, last, strict=True)))

    def _comparison(self, name: str, left: Value, right: Value) -> Value:
        if isinstance(left, Number) and isinstance(right, Number):
            return bool(_COMPARISONS[name](left.value, right.value))
        if isinstance(left, FORMULAS):
            left = select(left, Number(1.0), Number(0.0))
        if isinstance(right, FORMULAS):
            right = select(right, Number(1.0), Number(0.0))
        for one, other, swapped in ((left, right, False), (right, left, True)):
            if isinstance(one, Select) and not isinstance(other, Select):
                parts = [
                    self._comparison(name, other, part) if swapped else self._comparison(name, part, other)
                    for part in (one.then, one.other)
                ]
                return self._chosen(one.condition, parts[0], parts[1])
        a, b = _affine(left), _affine(right)
        if a is None or b is None:
            return Unknown()
        return self._order(name, sympy.expand(a - b))

    def _chosen(self, condition: Formula, then: Value, other: Value) -> Value:
        if not isinstance(then, FORMULAS) or not isinstance(other, FORMULAS):
            return Unknown()
        inverse = negate(condition, self._bounds)
        return either(both(condition, then), both(inverse, other))

    def _order(self, name: str, difference: sympy.Expr) -> Formula:
        up = at_least(difference if name in ("ge", "eq", "ne") else difference - 1, self._bounds)
        if name in ("ge", "gt"):
            return up
        down = at_least(-difference if name in ("le", "eq", "ne") else -difference - 1, self._bounds)
        if name in ("le", "lt"):
            return down
        equal = both(up, down)
        return equal if name == "eq" else negate(equal, self._bounds)

    def _logic(self, name: str, node: Node, at: At) -> Value | None:
        if views.dtype(node) != torch.bool:
            return None
        values = [self._formula(self._operand(node, each, at)) for each in node.args]
        if any(each is None for each in values):
            return None
        if name in _NOT:
            return negate(values[0], self._bounds)  # type: ignore[arg-type]
        join = both if name in _AND else either
        return join(values[0], values[1])  # type: ignore[arg-type]

    def _formula(self, value: Value) -> Formula | None:
        if isinstance(value, FORMULAS):
            return value
        return None if isinstance(value, Unknown) else self._comparison("ne", value, Number(0.0))  # type: ignore[return-value]

    def _arithmetic(self, name: str, node: Node, at: At) -> Value | None:
        left, right = self._operands(node, at)
        if views.dtype(node) == torch.bool:
            if not isinstance(left, FORMULAS) or not isinstance(right, FORMULAS) or name not in ("mul", "add"):
                return None
            return both(left, right) if name == "mul" else either(left, right)
        if node.kwargs.get("rounding_mode") is not None:
            return Unknown(_mild(left) and _mild(right))
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if not isinstance(alpha, (int, float)):
            return None
        return self._combine(name, _plain(left), _plain(right), float(alpha))

    def _combine(self, name: str, left: Value, right: Value, alpha: float) -> Value:
        if isinstance(left, Select) and not isinstance(right, Select):
            return select(left.condition, *(self._combine(name, part, right, alpha) for part in (left.then, left.other)))
        if isinstance(right, Select) and not isinstance(left, Select):
            parts = (self._combine(name, left, part, alpha) for part in (right.then, right.other))
            return select(right.condition, *parts)
        if isinstance(left, Number) and isinstance(right, Number):
            return _numbers(name, left.value, right.value, alpha)
        a, b = _affine(left), _affine(right)
        exact = name in ("add", "sub", "rsub") or (name == "mul" and (isinstance(left, Number) or isinstance(right, Number)))
        if a is not None and b is not None and exact and alpha.is_integer():
            step = sympy.Integer(int(alpha))
            return Index(sympy.expand({"add": a + step * b, "sub": a - step * b, "rsub": b - step * a, "mul": a * b}[name]))
        return Unknown(_mild(left) and _mild(right) and abs(alpha) <= 1e3)

    def _mild(self, name: str, node: Node, at: At) -> Value:
        if name == "embedding":
            return Unknown(mild=True)  # a learned table
        values = [self._operand(node, each, at) for each in node.args if isinstance(each, Node)]
        if name == "neg" and isinstance(values[0], (Number, Index)):
            return Number(-values[0].value) if isinstance(values[0], Number) else Index(-values[0].expr)
        return Unknown(all(_mild(each) for each in values))

    def _where(self, node: Node, at: At) -> Value | None:
        if len(node.args) != 3:
            return None
        condition = self._formula(self._operand(node, node.args[0], at))
        if condition is None:
            return None
        then, other = (self._operand(node, each, at) for each in node.args[1:])
        return select(condition, then, other)

    def _masked_fill(self, node: Node, at: At) -> Value | None:
        condition = self._formula(self._operand(node, node.args[1], at))
        if condition is None:
            return None
        return select(condition, self._operand(node, node.args[2], at), self._operand(node, node.args[0], at))

    def _tril(self, node: Node, at: At) -> Value:
        return self._triangle(node, at, at[-2] - at[-1] + _diagonal(node))

    def _triu(self, node: Node, at: At) -> Value:
        return self._triangle(node, at, at[-1] - at[-2] - _diagonal(node))

    def _triangle(self, node: Node, at: At, inside: sympy.Expr) -> Value:
        kept = at_least(inside, self._bounds)
        zero: Value = False if views.dtype(node) == torch.bool else Number(0.0)
        return select(kept, self.value(node.args[0], at), zero)

    def _index(self, node: Node, at: At) -> Value | None:
        source, picks = node.args[0], node.args[1]
        if not isinstance(picks, (list, tuple)) or any(each is None for each in picks):
            return None
        rest = len(views.shape(source)) - len(picks)
        broadcast = at[: len(at) - rest]
        taken: list[sympy.Expr] = []
        for each in picks:
            shape = views.shape(each)
            where = tuple(_zero(n, x) for n, x in zip(shape, broadcast[len(broadcast) - len(shape) :], strict=True))
            place = _affine(self.value(each, where))
            low = None if place is None else extremes(place, self._bounds)[0]
            if place is None or low is None or not low.is_nonnegative:
                return self._opaque(node, at)
            taken.append(place)
        return self.value(source, (*taken, *at[len(at) - rest :]))

    def _diff(self, node: Node, at: At) -> Value | None:
        """Differences of neighbours, where they are the same everywhere."""
        source, given = node.args[0], (*node.args[1:], 1, -1)
        prepend = node.args[3] if len(node.args) > 3 else node.kwargs.get("prepend")
        append = node.args[4] if len(node.args) > 4 else node.kwargs.get("append")
        if given[0] != 1 or append is not None:
            return None
        dim = int(given[1] if len(node.args) > 2 else -1) % len(at)  # type: ignore[arg-type]
        if prepend is None:
            return self._step(source, source, at, dim, at[dim] + 1, at[dim])
        if not known(views.shape(prepend)[dim] == 1):
            return None
        zero = sympy.Integer(0)
        first = self._step(source, prepend, at, dim, zero, zero)
        later = self._step(source, source, at, dim, at[dim], at[dim] - 1)
        return first if first is not None and first == later else None

    def _step(self, upper: Any, lower: Any, at: At, dim: int, high: sympy.Expr, low: sympy.Expr) -> Value | None:
        a = _affine(self.value(upper, (*at[:dim], high, *at[dim + 1 :])))
        b = _affine(self.value(lower, (*at[:dim], low, *at[dim + 1 :])))
        return None if a is None or b is None else Index(sympy.expand(a - b))

    def _cumsum(self, node: Node, at: At) -> Value | None:
        dim = int(node.args[1]) % len(at)  # type: ignore[arg-type]
        anywhere = sympy.Dummy("k", integer=True, nonnegative=True)
        self._bounds[anywhere] = expression(views.shape(node.args[0])[dim])
        value = _affine(_plain(self.value(node.args[0], (*at[:dim], anywhere, *at[dim + 1 :]))))
        if value is None or anywhere in value.free_symbols:
            return None
        return Index(sympy.expand(value * (at[dim] + 1)))


def _moved(node: Node, at: At) -> At | None:
    """Where the input of a view is read for the element at ``at`` of the view."""
    if node.target is aten.slice.Tensor:
        dim, start, step = (*node.args[1:3], *(0, 0)[len(node.args[1:3]) :], node.args[4] if len(node.args) > 4 else 1)
        if not isinstance(start, int) or not isinstance(step, int) or start < 0 or not isinstance(dim, int):
            return None
        dim %= len(at)
        return (*at[:dim], at[dim] * step + start, *at[dim + 1 :])
    if node.target is aten.select.int:
        dim, place = int(node.args[1]) % (len(at) + 1), node.args[2]  # type: ignore[arg-type]
        if not isinstance(place, int) or place < 0:
            return None
        return (*at[:dim], sympy.Integer(place), *at[dim:])
    if node.target is aten.expand.default:
        shape = views.shape(node.args[0])
        return tuple(_zero(n, x) for n, x in zip(shape, at[len(at) - len(shape) :], strict=True))
    if node.target in (*views.VIEWS,):
        return _through_groups(node, at)
    return None


def _through_groups(node: Node, at: At) -> At | None:
    """Views that only permute, insert or drop dims, seen through a fresh axis for each dim."""
    from iocompiler.passes.attention.axes import fresh

    dims = fresh(views.shape(node))
    places = {dims[d][0]: at[d] for d in range(len(at))}
    source = views.before(node, dims)
    if source is None:
        return None
    found: list[sympy.Expr] = []
    for group in source:
        place: sympy.Expr = sympy.Integer(0)
        for axis in group:
            if axis not in places or axis.parts is not None:
                return None
            place = place * expression(axis.size) + places[axis]
        found.append(sympy.expand(place))
    return tuple(found)


def _zero(extent: Any, place: sympy.Expr) -> sympy.Expr:
    return sympy.Integer(0) if known(extent == 1) else place


def _arange(node: Node, at: At) -> Value | None:
    values = [_whole(each) for each in node.args]
    if any(each is None for each in values):
        return None
    start = values[0] if len(values) > 1 else sympy.Integer(0)
    step = values[2] if len(values) > 2 else sympy.Integer(1)
    return Index(sympy.expand(start + step * at[0]))  # type: ignore[operator]


def _whole(value: Any) -> sympy.Expr | None:
    """An integer argument as an expression."""
    if isinstance(value, Node):
        value = view.value(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return expression(value) if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else None


def _filled(node: Node) -> Value | None:
    """The one value of a tensor made full of it."""
    name = getattr(node.target, "_opname", "")
    if name in ("ones", "ones_like", "new_ones"):
        return Number(1.0)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return Number(0.0)
    if name in ("full", "full_like", "scalar_tensor"):
        value = node.args[0] if name == "scalar_tensor" else node.args[1]
        return Number(float(value)) if isinstance(value, (bool, int, float)) else None
    if name == "new_full":
        return Number(float(node.args[2])) if isinstance(node.args[2], (bool, int, float)) else None
    return None


def _attribute(node: Node) -> Value | None:
    number = constant(node) if node.op == "get_attr" else None
    return None if number is None else Number(number)


def _scalar(node: Node) -> Value:
    whole = _whole(node)
    return Unknown() if whole is None else Index(whole)


def _affine(value: Value) -> sympy.Expr | None:
    if isinstance(value, Index):
        return value.expr
    if isinstance(value, Number) and value.value.is_integer():
        return sympy.Integer(int(value.value))
    return None


def _plain(value: Value) -> Value:
    return select(value, Number(1.0), Number(0.0)) if isinstance(value, FORMULAS) else value


def _mild(value: Value) -> bool:
    from iocompiler.passes.attention.values import is_mild

    return is_mild(value)


def _diagonal(node: Node) -> int:
    return int(node.args[1]) if len(node.args) > 1 else int(node.kwargs.get("diagonal", 0))  # type: ignore[arg-type]


def _numbers(name: str, left: float, right: float, alpha: float) -> Value:
    if name == "div" and right == 0.0:
        return Unknown()
    table = {
        "add": lambda: left + alpha * right,
        "sub": lambda: left - alpha * right,
        "rsub": lambda: right - alpha * left,
        "mul": lambda: left * right,
        "div": lambda: left / right,
        "minimum": lambda: min(left, right),
        "maximum": lambda: max(left, right),
    }
    return Number(table[name]())
