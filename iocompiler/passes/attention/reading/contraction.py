"""Contractions in any spelling, as two operands whose dims are written in common axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph.sizes import known
from iocompiler.passes.attention.dims.axes import Axis, Dims, broadcast, flat, fresh
from iocompiler.passes.attention.dims.views import shape

aten = torch.ops.aten
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
_SUMS = (aten.baddbmm.default, aten.addmm.default)
_OUTER = (aten.linear.default, aten.inner.default, aten.tensordot.default)
TARGETS = (*_PRODUCTS, *_SUMS, *_OUTER, aten.einsum.default)


@dataclass(frozen=True)
class Contraction:
    """``node = alpha * (sum over `contracted` of left * right) + beta * added``."""

    node: Node
    left: Node
    right: Node
    left_dims: Dims
    right_dims: Dims
    dims: Dims
    contracted: Axis
    alpha: float = 1.0
    beta: float = 1.0
    added: Node | None = None

    def operand(self, side: str) -> tuple[Node, Dims]:
        return (self.left, self.left_dims) if side == "left" else (self.right, self.right_dims)


def read(node: Node) -> Contraction | None:
    """The contraction of two tensors over one axis that the node is; None where it is not."""
    if node.op != "call_function":
        return None
    if node.target in _PRODUCTS:
        return _product(node, node.args[0], node.args[1])
    if node.target in _SUMS:
        alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
        if not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
            return None
        found = _product(node, node.args[1], node.args[2])
        added = node.args[0] if beta != 0 else None
        return found and Contraction(
            **{**vars(found), "alpha": alpha, "beta": beta, "added": added}
        )
    if node.target in _OUTER:
        return _outer(node)
    return _einsum(node) if node.target is aten.einsum.default else None


def _product(node: Node, left: Any, right: Any) -> Contraction | None:
    rows, columns = shape(left), shape(right)
    if len(rows) < 2 or len(columns) < 2:
        return None
    over = Axis(rows[-1])
    if known(over.size == 1):
        return None
    dims = fresh(shape(node))
    batch_left, batch_right = (broadcast(dims[:-2], each[:-2]) for each in (rows, columns))
    if batch_left is None or batch_right is None:
        return None
    return Contraction(
        node,
        left,
        right,
        (*batch_left, dims[-2], (over,)),
        (*batch_right, (over,), dims[-1]),
        dims,
        over,
    )


def _outer(node: Node) -> Contraction | None:
    """All dims of one tensor but that contracted, then those of the other. A layer of a network,
    whose weight is learned, is none.
    """
    arguments: Any = node.args
    left, right, *rest = arguments
    places: Any = rest if node.target is aten.tensordot.default else [[-1], [-1]]
    ranks = [len(shape(each)) for each in (left, right)]
    if min(ranks) < 2 or any(len(each) != 1 for each in places):
        return None
    if node.target is aten.linear.default and is_learned(right):
        return None
    one, other = (each[0] % rank for each, rank in zip(places, ranks, strict=True))
    over = Axis(shape(left)[one])
    if known(over.size == 1):
        return None
    dims = fresh(shape(node))
    first, last = list(dims[: ranks[0] - 1]), list(dims[ranks[0] - 1 :])
    first.insert(one, (over,))
    last.insert(other, (over,))
    added = rest[0] if rest and node.target is aten.linear.default else None
    return Contraction(node, left, right, tuple(first), tuple(last), dims, over, added=added)


def is_learned(node: Any) -> bool:
    """Whether the tensor is a parameter, as it is or cast or transposed."""
    while isinstance(node, Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    origin = getattr(node, "meta", {}).get("grapharg")
    return isinstance(getattr(origin, "fake_tensor", None), torch.nn.Parameter)


def _einsum(node: Node) -> Contraction | None:
    arguments: Any = node.args
    equation, operands = arguments[:2]
    text = str(equation).replace(" ", "")
    if (
        "." in text
        or "->" not in text
        or not isinstance(operands, (list, tuple))
        or len(operands) != 2
    ):
        return None
    inputs, result = text.split("->")
    letters = inputs.split(",")
    axes: dict[str, Axis] = {}
    for word, operand in zip(letters, operands, strict=True):
        if len(set(word)) != len(word):
            return None
        for letter, extent in zip(word, shape(operand), strict=True):
            if letter not in axes or known(axes[letter].size == 1):
                axes[letter] = Axis(extent)
    summed = set(axes) - set(result)
    if len(summed) != 1 or not summed <= set(letters[0]) & set(letters[1]):
        return None
    over = axes[summed.pop()]
    left, right = (
        tuple(
            () if known(n == 1) else (axes[x],) for x, n in zip(word, shape(operand), strict=True)
        )
        for word, operand in zip(letters, operands, strict=True)
    )
    if over not in flat(left) or over not in flat(right):
        return None
    return Contraction(
        node, operands[0], operands[1], left, right, tuple((axes[x],) for x in result), over
    )
