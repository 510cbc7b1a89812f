"""The scores, read back from what goes into the softmax to the contraction of query and key."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import Dims, broadcast
from iocompiler.passes.attention.reading import contraction
from iocompiler.passes.attention.reading.constants import constant, number
from iocompiler.passes.attention.reading.contraction import Contraction
from iocompiler.passes.attention.reading.description import (
    Bias,
    Cast,
    Declined,
    Fill,
    Inverse,
    Pointwise,
    Scale,
    Step,
    Sum,
)

aten = torch.ops.aten
_LONGEST = 64  # no score program is longer
SUMS = (aten.add.Tensor, aten.sub.Tensor)
_ADD = (aten.add.Tensor, aten.add.Scalar)
_SUB = (aten.sub.Tensor, aten.sub.Scalar)
_MUL = (aten.mul.Tensor, aten.mul.Scalar)
_DIV = (aten.div.Tensor, aten.div.Scalar)
_CONVERT = (*views.CASTS, aten.to.device)
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_WHERES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
_MAXIMA = (aten.max.other, aten.maximum.default)
_LEAST = -1e30  # and below: what hides a score
_UNARY = (
    aten.tanh.default,
    aten.neg.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.exp.default,
    aten.abs.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.pow.Tensor_Scalar,
    aten.square.default,
)


@dataclass(frozen=True)
class Scores:
    """A tensor of scores: the contraction it comes from, its dims, the program so far, the nodes on
    the way.
    """

    contraction: Contraction
    dims: Dims
    steps: tuple[Step, ...]
    nodes: tuple[Node, ...]

    def then(self, node: Node, *steps: Step, dims: Dims | None = None) -> Scores:
        return replace(
            self,
            steps=(*self.steps, *steps),
            nodes=(*self.nodes, node),
            dims=self.dims if dims is None else dims,
        )


def read(node: Node, fuel: int = _LONGEST, *, adds: bool = True) -> Scores | None:
    """The scores a node computes; None where no contraction is behind it. Without ``adds``, what
    `torch.baddbmm` adds is left out.

    Raises:
        Declined: a contraction is behind it, but not through steps that are understood.
    """
    found = contraction.read(node)
    if found is not None:
        return _from_contraction(found if adds else replace(found, added=None))
    if node.op != "call_function" or fuel == 0:
        return None
    if node.target in (*_ADD, *_SUB, *_MUL, *_DIV):
        return _binary(node, fuel - 1)
    if node.target in _WHERES:
        return _where(node, fuel - 1)
    if node.target in _MAXIMA:
        return _bounded(node, fuel - 1)
    source = node.args[0] if node.args else None
    if not views.is_tensor(source):
        return None
    if node.target not in (*views.VIEWS, *_CONVERT, *_FILLS, *_UNARY):
        return None
    scores = read(source, fuel - 1)
    if scores is None:
        return None
    if node.target in _CONVERT:
        return scores.then(node, Cast(views.dtype(node)))
    if node.target in _FILLS:
        return _fill(scores, node, node.args[1], node.args[2], keep=False)
    if node.target in _UNARY:
        return scores.then(node, Pointwise(node.target, tuple(node.args[1:]), views.dtype(node)))
    dims = views.after(node, scores.dims)
    if dims is None:
        raise Declined(f"{node.target} on the scores is no view that is understood")
    return scores.then(node, dims=dims)


def _from_contraction(found: Contraction) -> Scores:
    scores = Scores(found, found.dims, (), (found.node,))
    if found.alpha != 1.0:
        scores = replace(scores, steps=(Scale(found.alpha),))
    if found.added is not None:
        if _is_scores(found.added):
            raise Sum(found.node)
        bias = Bias(found.added, _against(scores.dims, found.added), found.beta)
        scores = replace(scores, steps=(*scores.steps, bias))
    return scores


def _is_scores(node: Node) -> bool:
    try:
        return read(node) is not None
    except Sum:
        return True
    except Declined:
        return False  # whatever it is, it can be added


def _binary(node: Node, fuel: int) -> Scores | None:
    left, right = node.args[0], node.args[1]
    sides = [side for side in (left, right) if views.is_tensor(side)]
    behind = _behind(sides, fuel, adds=node.target in (*_ADD, *_SUB))
    if not behind:
        return None
    if left is right and node.target is aten.mul.Tensor:
        return behind[0][1].then(node, Pointwise(aten.square.default))
    if len(behind) == 2:
        raise (
            Sum(node)
            if node.target in SUMS
            else Declined("the scores are a product or a quotient of two contractions")
        )
    side, scores = behind[0]
    other = right if side is left else left
    if len(scores.dims) != len(views.shape(node)):
        raise Declined("the scores are widened by a broadcast")
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    if not isinstance(alpha, (int, float)) or node.kwargs.get("rounding_mode") is not None:
        raise Declined(f"{node.target} with arguments that are not understood")
    return scores.then(
        node, *_arithmetic(node, scores.dims, other, float(alpha), first=side is left)
    )


def _behind(sides: list[Node], fuel: int, *, adds: bool) -> list[tuple[Node, Scores]]:
    """The sides that are scores. What is ``added`` to scores may itself be made of a contraction in
    a way that is not understood.
    """
    found: list[tuple[Node, Scores]] = []
    unread: Declined | None = None
    for side in sides:
        try:
            scores = read(side, fuel)
        except Sum:
            raise
        except Declined as reason:
            if not adds:
                raise
            unread = reason
        else:
            found += [] if scores is None else [(side, scores)]
    if unread is not None and not found:
        raise unread
    return found


def _arithmetic(node: Node, dims: Dims, other: Any, alpha: float, *, first: bool) -> list[Step]:
    """The steps of ``scores (op) other``, or of ``other (op) scores`` where not ``first``."""
    single = not views.is_tensor(other) or views.is_single(other)
    if node.target in (*_MUL, *_DIV):
        if node.target in _DIV and not first:
            raise Declined("the scores are divided by")
        factor = _inverse(other) if node.target in _DIV else other
        return [Scale(factor) if single else Scale(factor, _against(dims, other))]
    sign = 1.0 if node.target in _ADD else -1.0
    factors = (1.0, sign * alpha) if first else (sign * alpha, 1.0)
    if not views.is_tensor(other):
        if constant(other) == 0.0 and (first or node.target in _ADD):
            return []
        known_number = number(other)
        if known_number is None:
            raise Declined("a number known only at run time is added to the scores")
        added = Pointwise(aten.add.Scalar, (factors[1] * known_number,))
        return [Scale(factors[0]), added] if factors[0] != 1.0 else [added]
    bias = Bias(other, _against(dims, other), factors[1])
    return [Scale(factors[0]), bias] if factors[0] != 1.0 else [bias]


def _inverse(factor: Any) -> Any:
    return Inverse(factor) if isinstance(factor, Node) else 1.0 / factor


def _where(node: Node, fuel: int) -> Scores | None:
    condition, left, right = node.args[:3]
    for source, value, keep in ((left, right, True), (right, left, False)):
        if views.is_tensor(source):
            scores = read(source, fuel)
            if scores is not None:
                return _fill(scores, node, condition, value, keep=keep)
    return None


def _bounded(node: Node, fuel: int) -> Scores | None:
    """Scores that are finite after all: the maximum of them and the least number there is. Of other
    numbers the gradient of a maximum is shared where both are equal, which a clamp's is not.
    """
    for source, least in (node.args, node.args[::-1]):
        scores = read(source, fuel) if isinstance(source, Node) else None
        if scores is None:
            continue
        number = constant(least)
        if number is None or number > _LEAST:
            raise Declined("the maximum of the scores and of others")
        return scores.then(node, Pointwise(aten.clamp_min.default, (number,)))
    return None


def _fill(scores: Scores, node: Node, condition: Any, value: Any, *, keep: bool) -> Scores:
    number = constant(value)
    if number is None:
        raise Declined("masked scores are replaced by a tensor")
    if not isinstance(condition, Node) or views.dtype(condition) != torch.bool:
        raise Declined("the mask of the scores is not boolean")
    if len(scores.dims) != len(views.shape(node)):
        raise Declined("the scores are widened by a broadcast")
    return scores.then(node, Fill(condition, _against(scores.dims, condition), number, keep))


def _against(dims: Dims, other: Node) -> Dims:
    found = broadcast(dims, views.shape(other))
    if found is None:
        raise Declined("the scores are widened by a broadcast")
    return found
