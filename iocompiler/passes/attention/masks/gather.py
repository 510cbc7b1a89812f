"""Elements of what is picked by index, of differences along a dim, of running sums, of tensors put
together.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from iocompiler.graph.sizes import known
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import expression
from iocompiler.passes.attention.masks.arithmetic import affine, plain
from iocompiler.passes.attention.masks.places import At, aligned
from iocompiler.passes.attention.masks.protocol import Reading
from iocompiler.passes.attention.masks.values import Index, Unknown, Value, extremes, magnitude
from iocompiler.passes.attention.reading.contraction import is_learned

LEARNED = 1e3  # what no entry of a learned table of biases exceeds


def anywhere(reading: Reading, node: Node, at: At) -> Value:
    """What is no larger than the elements of the tensor that it is taken of, wherever."""
    source: Any = node.args[0]
    if is_learned(source):
        return Unknown(LEARNED)
    while source.op == "call_function" and source.target in views.VIEWS:
        source = source.args[0]
    names = [sympy.Dummy("k", integer=True, nonnegative=True) for _ in views.shape(source)]
    for name, extent in zip(names, views.shape(source), strict=True):
        reading.bounds[name] = expression(extent)
    return Unknown(magnitude(reading.value(source, tuple(names)), reading.bounds))


def picked(reading: Reading, node: Node, at: At) -> Value | None:
    source, picks = node.args[0], node.args[1]
    is_bool = views.dtype(node) == torch.bool
    if not isinstance(picks, (list, tuple)) or any(each is None for each in picks):
        return None
    rest = len(views.shape(source)) - len(picks)
    broadcast = at[: len(at) - rest]
    taken: list[sympy.Expr] = []
    for each in picks:
        place = affine(reading.value(each, aligned(views.shape(each), broadcast)))
        low = None if place is None else extremes(place, reading.bounds)[0]
        if place is None or low is None or not low.is_nonnegative:
            return reading.opaque(node, at) if is_bool else anywhere(reading, node, at)
        taken.append(place)
    return reading.value(source, (*taken, *at[len(at) - rest :]))


def differences(reading: Reading, node: Node, at: At) -> Value | None:
    """Differences of neighbours, where they are the same everywhere."""
    source, given = node.args[0], (*node.args[1:], 1, -1)
    prepend = node.args[3] if len(node.args) > 3 else node.kwargs.get("prepend")
    append = node.args[4] if len(node.args) > 4 else node.kwargs.get("append")
    if given[0] != 1 or append is not None:
        return None
    dim = int(given[1] if len(node.args) > 2 else -1) % len(at)  # type: ignore[arg-type]
    if prepend is None:
        return _step(reading, source, source, at, dim, at[dim] + 1, at[dim])
    if not known(views.shape(prepend)[dim] == 1):
        return None
    zero = sympy.Integer(0)
    first = _step(reading, source, prepend, at, dim, zero, zero)
    later = _step(reading, source, source, at, dim, at[dim], at[dim] - 1)
    return first if first is not None and first == later else None


def _step(
    reading: Reading, upper: Any, lower: Any, at: At, dim: int, high: sympy.Expr, low: sympy.Expr
) -> Value | None:
    a = affine(reading.value(upper, (*at[:dim], high, *at[dim + 1 :])))
    b = affine(reading.value(lower, (*at[:dim], low, *at[dim + 1 :])))
    return None if a is None or b is None else Index(sympy.expand(a - b))


def cumulated(reading: Reading, node: Node, at: At) -> Value | None:
    dim = int(node.args[1]) % len(at)  # type: ignore[arg-type]
    anywhere = sympy.Dummy("k", integer=True, nonnegative=True)
    reading.bounds[anywhere] = expression(views.shape(node.args[0])[dim])
    value = affine(plain(reading.value(node.args[0], (*at[:dim], anywhere, *at[dim + 1 :]))))
    if value is None or anywhere in value.free_symbols:
        return None
    return Index(sympy.expand(value * (at[dim] + 1)))


def joined(reading: Reading, node: Node, at: At) -> Value | None:
    """How large the elements of tensors are that are put together."""
    given: Any = (*node.args, node.kwargs.get("dim", 0))
    dim = int(given[1]) % len(at)
    bound = 0.0
    for each in given[0]:
        if len(views.shape(each)) != len(at):
            return None  # nothing may be joined to tensors of any rank
        anywhere = sympy.Dummy("k", integer=True, nonnegative=True)
        reading.bounds[anywhere] = expression(views.shape(each)[dim])
        found = reading.value(each, (*at[:dim], anywhere, *at[dim + 1 :]))
        bound = max(bound, magnitude(found, reading.bounds))
    return Unknown(bound)
