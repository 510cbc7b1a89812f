"""Gradients of embedding tables by kernels of ours, added to where a gradient stands already."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.match import graph_pass
from iocompiler.graph.sizes import same_sizes
from iocompiler.ops import target
from iocompiler.ops.embedding_gradient import DTYPES, GRADIENT, INDEX_DTYPES, ONTO

aten = torch.ops.aten

_ZEROS = (aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default)


@graph_pass(stage="flat")
def embedding_gradients(gm: GraphModule) -> int:
    """On a GPU, the gradient of a table, and its sum with another of the same table.

    Before::

        e = aten.embedding_dense_backward.default(grad, indices, 50257, -1, False)
        y = aten.add.Tensor(head, e)                                     # a table tied to the head

    After::

        y = iocompiler.embedding_gradient_onto.default(head, grad, indices, -1)

    Of rows that are indexed (``table[indices]``) too. Where ``head`` dies there, the planner lets
    the tokens' rows be added in its place. Several lookups in one table are added one onto another.
    Left to aten: gradients scaled by frequency, and dtypes the kernels do not take.
    """
    sites = sum(_taken(gm, node) for node in view.calls(gm, aten.embedding_dense_backward.default))
    sites += sum(_indexed(gm, node) for node in view.calls(gm, aten.index_put.default))
    return sites + sum(_added(gm, node) for node in view.calls(gm, aten.add.Tensor))


def _taken(gm: GraphModule, node: Node) -> int:
    grad, indices, rows, padding_idx, by_frequency = view.spelled_out(node)
    given, read = view.tensors(grad)[0], view.tensors(indices)[0]
    known = given.dtype in DTYPES and read.dtype in INDEX_DTYPES
    if by_frequency or not known or target.device_type(given) != "cuda":
        return 0
    new = rewrite.call(gm, GRADIENT, (grad, indices, rows, padding_idx), {}, near=node)
    rewrite.redirect(gm, node, new)
    return 1


def _indexed(gm: GraphModule, node: Node) -> int:
    """Rows added at one index each, to nothing; negative ones count from the end."""
    base, indices, grad, accumulate = view.spelled_out(node)
    if not accumulate or len(indices) != 1 or getattr(base, "target", None) not in _ZEROS:
        return 0
    (index,) = indices
    table, given, read = (view.tensors(each)[0] for each in (base, grad, index))
    known = given.dtype == table.dtype in DTYPES and read.dtype in INDEX_DTYPES
    rows = table.shape[0]
    if table.dim() != 2 or not isinstance(rows, int) or not known:
        return 0
    if target.device_type(given) != "cuda" or not same_sizes(
        given.shape, (*read.shape, table.shape[1])
    ):
        return 0

    def summed(index: Any, grad: Any) -> Any:
        placed = aten.where.self(aten.lt.Scalar(index, 0), aten.add.Tensor(index, rows), index)
        return GRADIENT(grad, placed, rows, -1)

    rewrite.substitute(gm, node, summed, index, grad)
    return 1


def _added(gm: GraphModule, add: Node) -> int:
    """The sum as the gradients of ``add``'s one operand put onto the other."""
    one, other, alpha = view.spelled_out(add)
    if alpha != 1 or not isinstance(one, Node) or not isinstance(other, Node):
        return 0
    for top, base in ((one, other), (other, one)):
        chain = _chain(top)
        if chain and base is not top and _is_like(base, top):
            for link in chain:
                base = rewrite.call(gm, ONTO, (base, *_lookup(link)), {}, near=add)
            rewrite.redirect(gm, add, base)
            return 1
    return 0


def _chain(top: Node) -> list[Node]:
    """Gradients put one onto another, which begin with zeros, in the order they are added; none
    where somebody else reads one of them.
    """
    chain: list[Node] = []
    node = top
    while len(node.users) == 1 and node.target in (ONTO, GRADIENT) and not node.kwargs:
        chain.append(node)
        if node.target is GRADIENT:
            return chain[::-1]
        node = node.args[0]  # type: ignore[assignment]
    return []


def _lookup(link: Node) -> tuple[Any, Any, Any]:
    """The gradient of the rows, their indices, the index that adds to nothing."""
    if link.target is ONTO:
        _, grad, indices, padding_idx = link.args
    else:
        grad, indices, _, padding_idx = link.args
    return grad, indices, padding_idx


def _is_like(base: Node, top: Node) -> bool:
    """Whether both are tensors of one shape and dtype."""
    if not isinstance(view.value(base), torch.Tensor):
        return False
    a, b = view.value(base), view.value(top)
    if a.dtype != b.dtype or a.device != b.device or a.dim() != b.dim():
        return False
    return same_sizes(a.shape, b.shape)
