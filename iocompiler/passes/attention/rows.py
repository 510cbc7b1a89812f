"""The softmax over the scores of a row, by its name or by hand: exp(x - max) / sum, the division
early or late.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from iocompiler.passes.attention.views import shape

aten = torch.ops.aten
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_MAX = (aten.amax.default, aten.max.dim)
_STILL = (aten.detach.default, aten.alias.default, aten.contiguous.default, aten.clone.default)


@dataclass(frozen=True)
class Softmax:
    """``node`` is softmax over ``dim`` of ``scores``; ``nodes`` are what it takes, the last one
    ``node``.

    Where ``late``, ``node`` is only exp(scores - max), to be divided by ``total``, its sum over
    ``dim``, later.
    """

    node: Node
    scores: Node
    dim: int
    nodes: tuple[Node, ...]
    total: Node | None = None


def read(node: Node) -> Softmax | None:
    """The softmax a node is; None where it is none."""
    if node.op != "call_function":
        return None
    if node.target in _SOFTMAX:
        scores: Any = node.args[0]
        return Softmax(node, scores, _dim(node, node.args[1]), (node,))
    divided = quotient(node)
    if divided is not None:
        top, bottom, between = divided
        totals = _totals(bottom, top)
        powers = _powers(top)
        if totals and powers is not None:
            found = _over(powers, totals[0])
            return found and Softmax(
                node, found.scores, found.dim, (*found.nodes, *totals, *between, node)
            )
        return None
    if node.target is aten.exp.default:
        return _log_sum(node)
    return None


def late(node: Node) -> Softmax | None:
    """exp(scores - max) whose sums over one dim are divided by later, if the node is that."""
    powers = _powers(node)
    if powers is None:
        return None
    sums = [user for user in node.users if user.target is aten.sum.dim_IntList]
    if len(sums) != 1:
        return None
    last = sums[0] if _keepdim(sums[0]) or len(sums[0].users) != 1 else next(iter(sums[0].users))
    totals = _totals(last, node) or (sums[0],)
    found = _over(powers, totals[0])
    return found and Softmax(node, found.scores, found.dim, (*found.nodes, *totals), totals[-1])


def quotient(node: Node) -> tuple[Node, Node, tuple[Node, ...]] | None:
    """Numerator and denominator of a division, also of a product with a reciprocal."""
    if node.target is aten.div.Tensor and len(node.args) == 2 and not node.kwargs:
        top, bottom = node.args
        return (top, bottom, ()) if isinstance(top, Node) and isinstance(bottom, Node) else None
    if node.target is aten.mul.Tensor:
        for top, other in (node.args, node.args[::-1]):
            if (
                isinstance(top, Node)
                and isinstance(other, Node)
                and other.target is aten.reciprocal.default
            ):
                return top, other.args[0], (other,)  # type: ignore[return-value]
    return None


@dataclass(frozen=True)
class _Powers:
    node: Node
    scores: Node
    dims: tuple[int, ...] | None  # over which the maximum is taken; None where any
    nodes: tuple[Node, ...]


def _powers(node: Node) -> _Powers | None:
    """exp(scores), exp(scores - max(scores))."""
    if node.target is not aten.exp.default or not isinstance(node.args[0], Node):
        return None
    inner = node.args[0]
    if inner.target is aten.sub.Tensor and len(inner.args) == 2 and not inner.kwargs:
        scores, shift = inner.args
        if isinstance(scores, Node) and isinstance(shift, Node):
            found = _maximum(shift, scores)
            if found is not None:
                return _Powers(node, scores, found[0], (*found[1], inner, node))
    return _Powers(node, inner, None, (node,))


def _maximum(node: Node, scores: Node) -> tuple[tuple[int, ...] | None, tuple[Node, ...]] | None:
    """The dims a maximum of ``scores`` is over, and the nodes that compute it."""
    nodes: list[Node] = []
    while node.target in (*_STILL, aten.unsqueeze.default) or _is_first(node):
        nodes.append(node)
        node = node.args[0]  # type: ignore[assignment]
    nodes.append(node)
    if node.target is aten.max.default and node.args[0] is scores:
        return None, tuple(nodes)
    if node.target not in _MAX or node.args[0] is not scores:
        return None
    given = node.args[1] if len(node.args) > 1 else ()
    dims = (given,) if isinstance(given, int) else tuple(given)  # type: ignore[arg-type]
    rank = len(shape(scores))
    inserted = [n for n in nodes if n.target is aten.unsqueeze.default]
    over = tuple(d % rank for d in dims)
    if _keepdim(node):
        return (over, tuple(nodes)) if not inserted else None
    if len(inserted) == 1 and len(over) == 1 and int(inserted[0].args[1]) % rank == over[0]:  # type: ignore[arg-type]
        return over, tuple(nodes)
    return None


def _is_first(node: Node) -> bool:
    return node.target is operator.getitem and node.args[1:] == (0,)


def _keepdim(node: Node) -> bool:
    return bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))


def _totals(node: Node, powers: Node) -> tuple[Node, ...]:
    """The nodes by which ``node`` is the sum of the powers over one dim, which it keeps: also by
    inserting it again. Empty where it is no such sum.
    """
    inserted = (node,) if node.target is aten.unsqueeze.default else ()
    total: Any = node.args[0] if inserted else node
    if total.target is not aten.sum.dim_IntList or total.args[0] is not powers:
        return ()
    if not inserted:
        return (total,) if _keepdim(total) else ()
    over = [int(dim) % len(shape(powers)) for dim in total.args[1] or ()]
    again = over == [int(node.args[1]) % len(shape(node))]  # type: ignore[arg-type]
    return (total, node) if again and not _keepdim(total) else ()


def _over(powers: _Powers, total: Node) -> Softmax | None:
    """The softmax whose powers are summed by ``total``, where sum and maximum go together."""
    given: Any = total.args[1]
    dims = (given,) if isinstance(given, int) else tuple(given or ())
    if len(dims) != 1 or total.kwargs.get("dtype") not in (None, total.meta["val"].dtype):
        return None
    dim = dims[0] % len(shape(powers.node))
    if powers.dims is not None and powers.dims != (dim,):
        return None  # a maximum over other dims is the same for no whole row, or only by luck
    return Softmax(powers.node, powers.scores, dim, powers.nodes, total)


def _log_sum(node: Node) -> Softmax | None:
    """exp(x - logsumexp(x)), exp(log_softmax(x))."""
    inner = node.args[0]
    if not isinstance(inner, Node):
        return None
    if inner.target in (aten.log_softmax.int, aten._log_softmax.default):
        scores: Any = inner.args[0]
        return Softmax(node, scores, _dim(inner, inner.args[1]), (inner, node))
    if inner.target is not aten.sub.Tensor or len(inner.args) != 2 or inner.kwargs:
        return None
    scores, total = inner.args
    if (
        not isinstance(total, Node)
        or total.target is not aten.logsumexp.default
        or total.args[0] is not scores
    ):
        return None
    dims: Any = total.args[1]
    if len(dims) != 1 or not _keepdim(total):
        return None
    return Softmax(node, scores, _dim(inner, dims[0]), (total, inner, node))  # type: ignore[arg-type]


def _dim(node: Node, dim: Any) -> int:
    return int(dim) % len(shape(node))
