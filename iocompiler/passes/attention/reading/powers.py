"""Powers of scores, their maxima and their sums: what a softmax by hand is made of."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph.sizes import known
from iocompiler.passes.attention.dims.views import shape

aten = torch.ops.aten
_MAX = (aten.amax.default, aten.max.dim)
_STILL = (aten.detach.default, aten.alias.default, aten.contiguous.default, aten.clone.default)
_LARGER = (aten.maximum.default, aten.max.other)
_FROM = (aten.clamp.default, aten.clamp_min.default)


@dataclass(frozen=True)
class Powers:
    """``node`` is exp(scores - shift), the shift None where there is none.

    Attributes:
        dims: over which the maximum is taken that is the shift; None where any.
        floored: whether the shift is no less than something else, so that it is never -inf.
        nodes: what ``node`` takes, it included.
    """

    node: Node
    scores: Node
    shift: Node | None
    dims: tuple[int, ...] | None
    floored: bool
    nodes: tuple[Node, ...]


def read(node: Node) -> Powers | None:
    """exp(scores), exp(scores - max(scores)); also less the larger of the maximum and another
    number of the row. What is subtracted from a row cancels out in a softmax.
    """
    if node.target is not aten.exp.default or not isinstance(node.args[0], Node):
        return None
    inner = node.args[0]
    if inner.target is aten.sub.Tensor and len(inner.args) == 2 and not inner.kwargs:
        scores, shift = inner.args
        if isinstance(scores, Node) and isinstance(shift, Node):
            found = maximum(shift, scores)
            if found is not None:
                floored = any(n.target in (*_LARGER, *_FROM, aten.relu.default) for n in found[1])
                return Powers(node, scores, shift, found[0], floored, (*found[1], inner, node))
    return Powers(node, inner, None, None, False, (node,))


def maximum(node: Node, scores: Node) -> tuple[tuple[int, ...] | None, tuple[Node, ...]] | None:
    """The dims a maximum of ``scores`` is over, and the nodes that compute it."""
    nodes: list[Node] = []
    while node.target in (*_STILL, aten.unsqueeze.default) or _is_first(node):
        nodes.append(node)
        node = node.args[0]  # type: ignore[assignment]
    nodes.append(node)
    if node.target is aten.max.default and node.args[0] is scores:
        return None, tuple(nodes)
    if node.target not in _MAX or node.args[0] is not scores:
        return _raised(node, scores, tuple(nodes))
    given = node.args[1] if len(node.args) > 1 else ()
    dims = (given,) if isinstance(given, int) else tuple(given)  # type: ignore[arg-type]
    rank = len(shape(scores))
    inserted = [n for n in nodes if n.target is aten.unsqueeze.default]
    over = tuple(d % rank for d in dims)
    if keepdim(node):
        return (over, tuple(nodes)) if not inserted else None
    if len(inserted) == 1 and len(over) == 1 and int(inserted[0].args[1]) % rank == over[0]:  # type: ignore[arg-type]
        return over, tuple(nodes)
    return None


def _raised(
    node: Node, scores: Node, nodes: tuple[Node, ...]
) -> tuple[tuple[int, ...] | None, tuple[Node, ...]] | None:
    """The larger of a maximum of ``scores`` and of a number, or of one for each row."""
    if node.op != "call_function" or any(n.target is aten.unsqueeze.default for n in nodes):
        return None
    if node.target is aten.relu.default or (node.target in _FROM and _only_least(node)):
        sources = [node.args[0]]
    elif node.target in _LARGER:
        sources = list(node.args[:2])
    else:
        return None
    for source in sources:
        found = maximum(source, scores) if isinstance(source, Node) else None
        if found is None or found[0] is None or len(shape(node)) != len(shape(scores)):
            continue
        if all(known(shape(node)[dim] == 1) for dim in found[0]):
            return found[0], (*found[1], *nodes)
    return None


def _only_least(node: Node) -> bool:
    """Whether a clamp has no upper bound."""
    return len(node.args) == 2 and isinstance(node.args[1], (int, float)) and not node.kwargs


def _is_first(node: Node) -> bool:
    return node.target is operator.getitem and node.args[1:] == (0,)


def keepdim(node: Node) -> bool:
    return bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))


def totals(node: Node, powers: Node) -> tuple[Node, ...]:
    """The nodes by which ``node`` is the sum of the powers over one dim, which it keeps: also by
    inserting it again. Empty where it is no such sum.
    """
    inserted = (node,) if node.target is aten.unsqueeze.default else ()
    total: Any = node.args[0] if inserted else node
    if total.target is not aten.sum.dim_IntList or total.args[0] is not powers:
        return ()
    if not inserted:
        return (total,) if keepdim(total) else ()
    over = [int(dim) % len(shape(powers)) for dim in total.args[1] or ()]
    again = over == [int(node.args[1]) % len(shape(node))]  # type: ignore[arg-type]
    return (total, node) if again and not keepdim(total) else ()


def same_rows(shift: Node | None, other: Node | None, dim: int) -> tuple[Node, ...] | None:
    """The nodes between two numbers of each row that are the same one, but for ``dim``, which one
    of them may lack; None where they are not.
    """
    if shift is None or other is None:
        return () if shift is other else None
    (one, inserted), (two, taken) = (_without_dim(each, dim) for each in (shift, other))
    return (*inserted, *taken) if one is two else None


def _without_dim(node: Node, dim: int) -> tuple[Node, tuple[Node, ...]]:
    """A number of each row from before ``dim``, of one element, was put in, or after it was taken
    out; and the nodes that do so.
    """
    nodes: list[Node] = []
    while node.target in (*_STILL, aten.unsqueeze.default, aten.squeeze.dim) or _is_first(node):
        source: Any = node.args[0]
        if node.target in (aten.unsqueeze.default, aten.squeeze.dim):
            rank = max(len(shape(node)), len(shape(source)))
            if int(node.args[1]) % rank != dim or len(shape(node)) == len(shape(source)):  # type: ignore[arg-type]
                break
        nodes.append(node)
        node = source
    return node, tuple(nodes)


def summed_dim(powers: Powers, total: Node) -> int | None:
    """The one dim that ``total`` sums the powers over, where the maximum is over it too: one over
    other dims is the same for no whole row, or only by luck.
    """
    given: Any = total.args[1]
    dims = (given,) if isinstance(given, int) else tuple(given or ())
    if len(dims) != 1 or total.kwargs.get("dtype") not in (None, total.meta["val"].dtype):
        return None
    dim = dims[0] % len(shape(powers.node))
    return dim if powers.dims in (None, (dim,)) else None


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
