"""Where a view reads its input, and the tensors whose elements follow from their place alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.held import held
from iocompiler.graph.patterns import Band, Hiding
from iocompiler.graph.sizes import known
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import Axis, expression, fresh, resolve
from iocompiler.passes.attention.masks.values import (
    Bounds,
    Formula,
    Index,
    Number,
    Opaque,
    Unknown,
    Value,
    at_least,
    both,
    extremes,
    negate,
    select,
)
from iocompiler.passes.attention.reading.constants import constant

aten = torch.ops.aten
ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
At: TypeAlias = tuple[sympy.Expr, ...]


Part: TypeAlias = Callable[[sympy.Expr, Any, Any], tuple[sympy.Expr, sympy.Expr] | None]
"""The two places along an axis that is parted, in sizes of these, from that along the whole."""


def moved(node: Node, at: At, bounds: Bounds, part: Part | None = None) -> At | None:
    """Where the input of a view is read for the element at ``at`` of the view; ``part`` parts what
    is not parted by what it is a sum of.
    """
    if node.target is aten.slice.Tensor:
        _, dim, start, _, step = view.spelled_out(node)
        start = 0 if start is None else start
        if not isinstance(start, int) or start < 0 or not isinstance(step, int):
            return None
        dim %= len(at)
        return (*at[:dim], at[dim] * step + start, *at[dim + 1 :])
    if node.target is aten.select.int:
        dim, place = int(node.args[1]) % (len(at) + 1), node.args[2]  # type: ignore[arg-type]
        if not isinstance(place, int) or place < 0:
            return None
        return (*at[:dim], sympy.Integer(place), *at[dim:])
    if node.target is aten.expand.default:
        return aligned(views.shape(node.args[0]), at)
    if node.target in (*views.VIEWS, *views.REPEATS):
        return _through_groups(node, at, bounds, part)
    return None


def _through_groups(node: Node, at: At, bounds: Bounds, part: Part | None) -> At | None:
    """Views that permute, insert, drop, merge, part or repeat dims, seen through an axis for each
    dim.
    """
    dims = fresh(views.shape(node))
    source = views.before(node, dims)
    if source is None:
        return None
    places: dict[Axis, sympy.Expr] = {}
    if not all(_put(dims[d][0], at[d], places, bounds, part) for d in range(len(at))):
        return None
    found: list[sympy.Expr] = []
    for group in source:
        place: sympy.Expr = sympy.Integer(0)
        for axis in resolve(group):
            place = place * expression(axis.size) + places[axis]
        found.append(sympy.expand(place))
    return tuple(found)


def _put(
    axis: Axis,
    at: sympy.Expr,
    places: dict[Axis, sympy.Expr],
    bounds: Bounds,
    part: Part | None,
) -> bool:
    """Note the place along an axis, or along those it was parted into; false where they mix."""
    places[axis] = at
    if axis.parts is None:
        return True
    outer, inner = axis.parts
    pair = _apart(at, expression(inner.size), bounds)
    if pair is None and part is not None:
        pair = part(at, outer.size, inner.size)
    if pair is None:
        return False
    return all(
        _put(each, place, places, bounds, part)
        for each, place in zip((outer, inner), pair, strict=True)
    )


def _apart(
    at: sympy.Expr, size: sympy.Expr, bounds: Bounds
) -> tuple[sympy.Expr, sympy.Expr] | None:
    """A place as a multiple of a size and a rest that is smaller; None where that is not known."""
    terms = sympy.Add.make_args(sympy.expand(at))
    whole = sum((term for term in terms if (term / size).is_integer), sympy.Integer(0))
    rest = sympy.expand(at - whole)
    low, high = extremes(rest, bounds)
    if low is None or high is None:
        return None
    if not low.is_nonnegative or not (size - 1 - high).is_nonnegative:
        return None
    return sympy.expand(whole / size), rest


def zero(extent: Any, place: sympy.Expr) -> sympy.Expr:
    return sympy.Integer(0) if known(extent == 1) else place


def aligned(shape: Sequence[Any], at: At) -> At:
    """Where a tensor that is broadcast is read for the element at ``at`` of the result."""
    last = at[len(at) - len(shape) :]
    return tuple(zero(n, x) for n, x in zip(shape, last, strict=True))


def of_operand(operand: Any, at: At) -> At:
    """`aligned`, for an operand that may be a number."""
    return aligned(views.shape(operand), at) if views.is_tensor(operand) else ()


def arange(node: Node, at: At) -> Index | None:
    values = [whole(each) for each in node.args]
    if any(each is None for each in values):
        return None
    start = values[0] if len(values) > 1 else sympy.Integer(0)
    step = values[2] if len(values) > 2 else sympy.Integer(1)
    return Index(sympy.expand(start + step * at[0]))


def whole(value: Any) -> sympy.Expr | None:
    """An integer argument as an expression."""
    if isinstance(value, Node):
        value = view.value(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return (
        expression(value)
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
        else None
    )


def filled(node: Node) -> Value | None:
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


def given(node: Node, at: At, bounds: Bounds) -> Value | None:
    """The element of an input or a constant, as far as it is known what that holds."""
    number = constant(node) if node.op == "get_attr" else None
    if number is not None:
        return Number(number)
    match held(node):
        case Band(inside, outside) as band:
            within = _within(band, at, bounds)
            if views.dtype(node) == torch.bool:
                return within if inside else negate(within, bounds)
            return select(within, Number(inside), Number(outside))
        case Hiding(value, bound):
            other: Value = Unknown(bound) if bound else Number(0.0)
            return select(Opaque((node, at)), other, Number(value))
    return None


def ends(band: Band, at: At) -> tuple[sympy.Expr, ...]:
    """What is not negative inside of the band."""
    apart = at[-1] - at[-2]
    low = () if band.low is None else (apart - band.low,)
    high = () if band.high is None else (band.high - apart,)
    return tuple(sympy.expand(end) for end in (*high, *low))


def _within(band: Band, at: At, bounds: Bounds) -> Formula:
    found: Formula = True
    for end in ends(band, at):
        found = both(found, at_least(end, bounds))
    return found


def scalar(node: Node) -> Value:
    number = whole(node)
    return Unknown() if number is None else Index(number)
