"""One more score in each row of a softmax, whose probability nobody reads: a sink, put beside the
scores or added to the sum of their powers. "Softmax plus one" has a sink of zero.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph.sizes import known
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.reading import powers
from iocompiler.passes.attention.reading.constants import constant
from iocompiler.passes.attention.reading.powers import Powers

aten = torch.ops.aten
_PADS = (aten.pad.default, aten.constant_pad_nd.default)
_ADD = (aten.add.Tensor, aten.add.Scalar)


@dataclass(frozen=True)
class Sink:
    """The score beside those of a row: a tensor that broadcasts against the rows' sums, which keep
    their dim, or a number.

    Attributes:
        nodes: what the sink takes but ``of``, and reads scores or is read by nobody else.
        guards: whether a row in which nothing else counts is zeros, as of a softmax over both; by
            hand it may be NaN.
    """

    of: Node | float
    nodes: tuple[Node, ...]
    guards: bool = True


@dataclass(frozen=True)
class Joined:
    """``node`` is ``scores`` with a sink beside them along ``dim``, ``first`` or last."""

    node: Node
    scores: Node
    dim: int
    first: bool
    sink: Sink


def joined(node: Node) -> Joined | None:
    """Scores with one more column, if the node is that."""
    if node.target is aten.cat.default:
        return _concatenated(node)
    if node.target in _PADS:
        return _padded(node)
    return None


def _concatenated(node: Node) -> Joined | None:
    parts: Any = node.args[0]
    if len(parts) != 2:
        return None
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    dim = given % len(views.shape(node))
    for scores, sink, first in ((parts[0], parts[1], False), (parts[1], parts[0], True)):
        if known(views.shape(sink)[dim] == 1):
            number = constant(sink)
            of = sink if number is None else number
            return Joined(node, scores, dim, first, Sink(of, (node,)))
    return None


def _padded(node: Node) -> Joined | None:
    scores, widths, *rest = node.args
    given = [each for each in (*rest, node.kwargs.get("value")) if each is not None]
    value = given[-1] if given and not isinstance(given[-1], str) else 0.0
    mode = given[0] if given and isinstance(given[0], str) else "constant"
    if not isinstance(scores, Node) or not isinstance(value, (int, float)) or mode != "constant":
        return None
    ends = tuple(widths) if isinstance(widths, (list, tuple)) else ()
    if ends not in ((0, 1), (1, 0)):
        return None
    dim = len(views.shape(node)) - 1
    return Joined(node, scores, dim, ends == (1, 0), Sink(float(value), (node,)))


def without(node: Node, found: Joined) -> Node | None:
    """What ``node`` takes the sink's column from; None where it takes anything else."""
    source = _narrowed(node, found)
    whole = node.op == "call_function" and source is not None
    sizes = views.shape(node) if whole else ()
    same = whole and known(sizes[found.dim] == views.shape(found.scores)[found.dim])
    return source if same else None


def _narrowed(node: Node, found: Joined) -> Node | None:
    start = int(found.first)
    if node.target is operator.getitem:
        pieces: Any = node.args[0]
        if pieces.target is not aten.split_with_sizes.default or len(pieces.args[1]) != 2:
            return None
        at = pieces.args[2] if len(pieces.args) > 2 else 0
        right = at % len(views.shape(found.node)) == found.dim and node.args[1] == start
        return pieces.args[0] if right else None
    if node.target not in (aten.slice.Tensor, aten.narrow.default):
        return None
    source: Any = node.args[0]
    given: list[Any] = [*node.args[1:], None, None, None, None][:4]
    dim, begin, step = given[0] or 0, given[1] or 0, given[3] or 1
    right = dim % len(views.shape(node)) == found.dim and begin == start and step == 1
    return source if right else None


def beside(total: Node, found: Powers) -> tuple[Node, Sink] | None:
    """The sum of the powers and the sink that ``total`` is made of: sum + exp(sink - shift)."""
    if total.target not in _ADD or len(total.args) != 2 or total.kwargs:
        return None
    for of_powers, other in (total.args, total.args[::-1]):
        if isinstance(of_powers, Node) and powers.totals(of_powers, found.node):
            sink = _power(other, found)
            if sink is not None:
                return of_powers, Sink(sink[0], (*sink[1], total), found.floored or not found.shift)
    return None


def _power(node: Any, found: Powers) -> tuple[Node | float, tuple[Node, ...]] | None:
    """x and the nodes between where the node is exp(x - shift)."""
    if found.shift is None and constant(node) is not None:
        number = constant(node)
        return (math.log(number), ()) if number is not None and number > 0.0 else None
    if not isinstance(node, Node) or node.target is not aten.exp.default:
        return None
    inner: Any = node.args[0]
    if found.shift is None:
        return inner, (node,)
    if inner.target is aten.neg.default and inner.args[0] is found.shift:
        return 0.0, (inner, node)
    if inner.target is aten.sub.Tensor and len(inner.args) == 2 and not inner.kwargs:
        sink, shift = inner.args
        if shift is found.shift and sink is not found.shift:
            number = constant(sink)
            return (sink if number is None else number), (inner, node)
    return None


def of_sum(total: Node) -> tuple[Node, Sink] | None:
    """What keeps its dim and is log(exp(x) + exp(sink)): x and the sink, by `logaddexp`."""
    if total.target is not aten.logaddexp.default:
        return None
    for one, other in (total.args, total.args[::-1]):
        if isinstance(one, Node) and one.target is aten.logsumexp.default:
            number = constant(other)
            return one, Sink(other if number is None else number, (total,))  # type: ignore[arg-type]
    return None
