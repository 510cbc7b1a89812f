"""What each operator must be given so that it computes a range of one dimension of its result: for
each argument the dimension along which it is cut, by the same range.

An argument that is not named is taken whole. No rule, or None: the operator wants all of its
arguments whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.sizes import known

aten = torch.ops.aten
Cuts: TypeAlias = dict[Node, int]
Rule: TypeAlias = Callable[[Node, int], Cuts | None]


def cuts(node: Node, dim: int) -> Cuts | None:
    """The arguments to cut for a range of ``dim`` of the node's result."""
    target: Any = node.target
    rule = _RULES.get(target)
    if rule is None and _is_pointwise(target):
        rule = _pointwise
    return None if rule is None else rule(node, dim)


def moves_only(node: Node) -> bool:
    """Whether the operator computes nothing."""
    return node.target in _VIEWS


def resized(node: Node, dim: int, length: int) -> tuple[Any, ...]:
    """The arguments of an operator whose ``dim`` has another length now."""
    target: Any = node.target
    place = _SIZES.get(target)
    if place is None:
        return node.args
    args = list(node.args)
    sizes = list(args[place])  # type: ignore[arg-type]
    sizes[dim] = length
    args[place] = sizes
    return tuple(args)


def _is_pointwise(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.pointwise in target.tags


def _pointwise(node: Node, dim: int) -> Cuts | None:
    """Broadcast arguments are cut where they have the dimension."""
    made = view.value(node)
    found: Cuts = {}
    for each in node.all_input_nodes:
        given = view.value(each)
        if not isinstance(given, Tensor):
            continue
        at = dim - (made.dim() - given.dim())
        if at < 0 or known(given.shape[at] == 1):
            continue
        if not known(given.shape[at] == made.shape[dim]):
            return None
        found[each] = at
    return found


def _first(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _same(node: Node, dim: int) -> Cuts | None:
    """One tensor, dimension for dimension."""
    return {_first(node): dim}


def _along(place: int) -> Rule:
    """As `_same`, but not along the dimension that the argument at ``place`` names."""

    def rule(node: Node, dim: int) -> Cuts | None:
        across = node.args[place] if len(node.args) > place else -1
        if not isinstance(across, int) or across % view.value(node).dim() == dim:
            return None
        return {_first(node): dim}

    return rule


def _linear(node: Node, dim: int) -> Cuts | None:
    return None if dim == view.value(node).dim() - 1 else {_first(node): dim}


def _matmul(node: Node, dim: int) -> Cuts | None:
    left, right = node.args[:2]
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    ranks = [view.value(x).dim() for x in (left, right)]
    rank = view.value(node).dim()
    if left is right or min(ranks) < 2 or dim == rank - 1:
        return None
    if dim == rank - 2:
        return {left: ranks[0] - 2}
    found: Cuts = {}
    for x, own in zip((left, right), ranks, strict=True):
        at = dim - (rank - own)
        if at >= 0 and not known(view.value(x).shape[at] == 1):
            if not known(view.value(x).shape[at] == view.value(node).shape[dim]):
                return None
            found[x] = at
    return found


def _normalised(node: Node, dim: int) -> Cuts | None:
    shape = node.args[1]
    assert isinstance(shape, Sequence)
    return {_first(node): dim} if dim < view.value(node).dim() - len(shape) else None


def _reduced(node: Node, dim: int) -> Cuts | None:
    """A reduction over other dimensions."""
    given = view.value(_first(node))
    dims = node.args[1] if len(node.args) > 1 else None
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if isinstance(dims, int):
        dims = [dims]
    if not isinstance(dims, (list, tuple)) or not dims or not isinstance(keep, bool):
        return None
    gone = {d % given.dim() for d in dims if isinstance(d, int)}
    if keep:
        return None if dim in gone else {_first(node): dim}
    left = [d for d in range(given.dim()) if d not in gone]
    return {_first(node): left[dim]}


def _attention(node: Node, dim: int) -> Cuts | None:
    """Rows of queries, each of which sees all keys: with its row of the mask."""
    query, key, value, mask, _, causal = (view.spelled_out(node) + [None] * 6)[:6]
    rank = view.value(node).dim()
    if dim != rank - 2 or causal is not False or query in (key, value):
        return None
    found: Cuts = {query: rank - 2}
    if isinstance(mask, Node):
        rows = view.value(mask)
        if rows.dim() < 2 or mask in (query, key, value):
            return None
        if not known(rows.shape[-2] == 1):
            found[mask] = rows.dim() - 2
    return found


def _embedding(node: Node, dim: int) -> Cuts | None:
    indices = node.args[1]
    assert isinstance(indices, Node)
    return {indices: dim} if dim < view.value(indices).dim() else None


def _joined(node: Node, dim: int) -> Cuts | None:
    across = node.args[1] if len(node.args) > 1 else 0
    rank = view.value(node).dim()
    parts = list(node.args[0])  # type: ignore[arg-type]
    if not isinstance(across, int) or across % rank == dim:
        return None
    if any(view.value(part).dim() != rank for part in parts):
        return None
    return dict.fromkeys(parts, dim)


# views


def _permuted(node: Node, dim: int) -> Cuts | None:
    order = node.args[1]
    rank = view.value(node).dim()
    return {_first(node): order[dim] % rank}  # type: ignore[index]


def _swapped(node: Node, dim: int) -> Cuts | None:
    rank = view.value(node).dim()
    a, b = (d % rank for d in node.args[1:3])
    return {_first(node): {a: b, b: a}.get(dim, dim)}


def _turned(node: Node, dim: int) -> Cuts | None:
    return {_first(node): view.value(node).dim() - 1 - dim}


def _unsqueezed(node: Node, dim: int) -> Cuts | None:
    at = node.args[1] % view.value(node).dim()
    return None if dim == at else {_first(node): dim - (dim > at)}


def _selected(node: Node, dim: int) -> Cuts | None:
    across = node.args[1] % view.value(_first(node)).dim()
    return {_first(node): dim + (dim >= across)}


def _expanded(node: Node, dim: int) -> Cuts | None:
    given, made = view.value(_first(node)), view.value(node)
    at = dim - (made.dim() - given.dim())
    if at < 0 or known(given.shape[at] == 1):
        return {}
    return {_first(node): at} if known(given.shape[at] == made.shape[dim]) else None


def _reshaped(node: Node, dim: int) -> Cuts | None:
    """A dimension that stands with as many elements before it, and after it, as it did."""
    given, made = view.value(_first(node)).shape, view.value(node).shape
    for at, size in enumerate(given):
        same = known(size == made[dim]) and known(_count(given[:at]) == _count(made[:dim]))
        if same and known(_count(given[at + 1 :]) == _count(made[dim + 1 :])):
            return {_first(node): at}
    return None


def _count(sizes: Sequence[Any]) -> Any:
    count: Any = 1
    for size in sizes:
        count = count * size
    return count


_VIEWS: dict[Any, Rule] = {
    aten.permute.default: _permuted,
    aten.transpose.int: _swapped,
    aten.t.default: _turned,
    aten.unsqueeze.default: _unsqueezed,
    aten.select.int: _selected,
    aten.slice.Tensor: _along(1),
    aten.expand.default: _expanded,
    aten.view.default: _reshaped,
    aten.reshape.default: _reshaped,
    aten._unsafe_view.default: _reshaped,
    aten.contiguous.default: _same,
    aten.clone.default: _same,
    aten.alias.default: _same,
}
_SIZES = {
    aten.expand.default: 1,
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten._unsafe_view.default: 1,
}
"""Where the sizes of the result stand among the arguments."""
_RULES: dict[Any, Rule] = {
    **_VIEWS,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.layer_norm.default: _normalised,
    aten.rms_norm.default: _normalised,
    aten.softmax.int: _along(1),
    aten.log_softmax.int: _along(1),
    aten.cumsum.default: _along(1),
    aten.sum.dim_IntList: _reduced,
    aten.mean.dim: _reduced,
    aten.amax.default: _reduced,
    aten.amin.default: _reduced,
    aten.var.correction: _reduced,
    aten.scaled_dot_product_attention.default: _attention,
    aten.embedding.default: _embedding,
    aten.cat.default: _joined,
    aten.dropout.default: _same,
    aten.to.dtype: _same,
    aten._to_copy.default: _same,
    aten.type_as.default: _same,
}
