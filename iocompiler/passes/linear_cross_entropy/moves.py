"""Calls that choose or order the rows of logits, whose classes stay as they are; and those that cut
the classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.sizes import equal
from iocompiler.passes.linear_cross_entropy.description import Declined

aten = torch.ops.aten
_RANKED = (aten.unsqueeze.default, aten.squeeze.dim)
_INDEXED = (aten.index.Tensor, aten.index_select.default)
RESHAPES = (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, *_RANKED)
MOVES = (*RESHAPES, aten.slice.Tensor, aten.select.int, *_INDEXED)
TRANSPOSES = (aten.transpose.int, aten.permute.default)


def rows(calls: Iterable[Node]) -> tuple[Any, ...]:
    """Which rows of a head's logits ``calls`` choose, one after the other, and in what order, and
    which classes: equal for those that choose the same.
    """
    return tuple(
        (node.target, node.args[1:], tuple(map(str, view.tensors(node.args[0])[0].shape)))  # type: ignore[arg-type]
        for node in calls
        if node.target in (*MOVES, *TRANSPOSES) and node.target not in RESHAPES
    )


def order_of(node: Node) -> list[int]:
    """For each dim of a transposition's result, the dim it was."""
    rank = view.tensors(node)[0].dim()
    order = list(range(rank))
    arguments: Any = node.args
    if node.target is aten.permute.default:
        return [d % rank for d in arguments[1]]
    one, other = (d % rank for d in arguments[1:3])
    order[one], order[other] = order[other], order[one]
    return order


def check_move(node: Node, dim: int) -> None:
    """Whether the classes, along ``dim`` of the result, are the last dim before and behind.

    Raises:
        Declined: they are not, or how many rows are chosen is known only at run time.
    """
    old, new = view.tensors(node.args[0])[0], view.tensors(node)[0]  # type: ignore[arg-type]
    kept = old.dim() and dim == new.dim() - 1 and equal(old.shape[-1], new.shape[-1])
    if not kept or _is_of_classes(node, old.dim()):
        raise Declined(f"{node.target} splits or cuts the classes")
    if any(index.dtype in (torch.bool, torch.uint8) for index in _indices(node)):
        raise Declined("a mask chooses among the rows of the logits")


def _indices(node: Node) -> list[torch.Tensor]:
    if node.target is not aten.index.Tensor:
        return []
    given: Any = node.args[1]
    return [view.tensors(each)[0] for each in given if each is not None]


def _is_of_classes(node: Node, rank: int) -> bool:
    """Whether what a call names of an operand of ``rank`` dims is the last of them."""
    arguments: Any = node.args
    if node.target is aten.index.Tensor:
        return len(arguments[1]) == rank and arguments[1][-1] is not None
    if node.target is aten.unsqueeze.default:
        return bool(arguments[1] % (rank + 1) == rank)
    if node.target in RESHAPES and node.target is not aten.squeeze.dim:
        return False
    which = arguments[1] if len(arguments) > 1 else 0
    return bool(which % rank == rank - 1)


def is_cut(node: Node, dim: int) -> bool:
    """Whether a slice chooses among the classes, along ``dim``, and they follow each other: the
    logits of a vocabulary that was filled up.
    """
    if node.target is not aten.slice.Tensor:
        return False
    which, *ends = (*node.args[1:], 0)[: max(1, len(node.args) - 1)]
    plain = len(ends) < 3 and all(each is None or isinstance(each, int) for each in ends)
    return plain and bool(which % view.tensors(node)[0].dim() == dim)  # type: ignore[operator]
