"""Copies that only matrix products read, which read the original as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.sizes import equal, known, same_sizes
from iocompiler.ops import target

aten = torch.ops.aten
COPIES = (aten.contiguous.default, aten.clone.default)
# where the two operands stand
_OPERANDS: dict[Any, tuple[int, int]] = {
    aten.linear.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}
_ALIGNED = 16  # bytes, at which rows of operands must begin for the fast kernels


def read_originals(gm: GraphModule, still: Callable[[Node], bool]) -> int:
    """``x @ w.t().contiguous()``  -->  ``x @ w.t()``: on a GPU, where each reader of a copy is a
    product (or a transposition that one reads) and the original lies as an operand of it may:
    rows or columns side by side, aligned.

    Args:
        still: whether nothing is ever written where a node lies.
    """
    sites = 0
    for node in list(view.calls(gm, *COPIES)):
        source: Any = node.args[0]
        value = view.value(node)
        if not isinstance(value, Tensor) or target.device_type(value) != "cuda":
            continue
        if not (still(node) and still(source) and node.users):
            continue
        if all(_reads(user, node, view.value(source)) for user in node.users):
            turned = [user for user in node.users if user.target is aten.transpose.int]
            rewrite.bypass(gm, node, source)
            for each in turned:
                rewrite.compute_value(each)
            sites += 1
    return sites


def _reads(user: Node, node: Node, lies: Tensor) -> bool:
    """Whether ``user`` is a product that reads ``lies`` in place of ``node``, or a transposition
    that only such products read.
    """
    if user.target is aten.transpose.int:
        turned = lies.transpose(*user.args[1:])  # type: ignore[arg-type]
        return bool(user.users) and all(
            each.target is not aten.transpose.int and _reads(each, user, turned)
            for each in user.users
        )
    if user.target not in _OPERANDS:
        return False
    places = _OPERANDS[user.target]
    given = [place for place, each in enumerate(user.args) if each is node]
    if not given or not {*given} <= {*places} or node in user.kwargs.values():
        return False
    left, right = (view.tensors(user.args[place])[0] for place in places)  # type: ignore[arg-type]
    if left.dim() < 2 or right.dim() < 2:
        return False
    if left.dim() > 2 and right.dim() > 2:
        return same_sizes(left.shape[:-2], right.shape[:-2]) and _is_matrices(lies)
    # of more dims, rows of one matrix; by matmul only on the left
    return right.dim() == 2 and _is_rows(lies)


def _is_matrices(x: Tensor) -> bool:
    """Whether they follow each other at one stride."""
    sizes, strides = x.shape[:-2], x.stride()[:-2]
    positive = all(known(stride > 0) and _is_aligned(x, stride) for stride in strides)
    return positive and _follow(sizes, strides) and _is_matrix(x, *x.stride()[-2:])


def _is_rows(x: Tensor) -> bool:
    return _follow(x.shape[:-1], x.stride()[:-1]) and _is_matrix(x, *x.stride()[-2:])


def _follow(sizes: Sequence[Any], strides: Sequence[Any]) -> bool:
    """Whether dims can be taken as one."""
    inner = zip(sizes[1:], strides[1:], strict=True)
    return all(equal(stride, s * n) for stride, (n, s) in zip(strides, inner, strict=False))


def _is_matrix(x: Tensor, down: Any, across: Any) -> bool:
    """Whether rows or columns are side by side, one beginning where the one before has ended, or
    behind.
    """
    rows, columns = x.shape[-2:]
    by_rows = equal(across, 1) and known(down >= columns) and _is_aligned(x, down)
    by_columns = equal(down, 1) and known(across >= rows) and _is_aligned(x, across)
    return (by_rows or by_columns) and _is_aligned(x, x.storage_offset())


def _is_aligned(x: Tensor, elements: Any) -> bool:
    return equal(elements * x.element_size() % _ALIGNED, 0)
