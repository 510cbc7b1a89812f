"""Counters that are read and then counted on: who reads an old value later than it was there."""

from __future__ import annotations

import math
import operator

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view

aten = torch.ops.aten

_MOST = 16
"""Elements of what is copied: a copy of so few is an operand of whatever kernel reads it."""


def snapshots(gm: GraphModule) -> int:
    """What has been read of a small integer input before that is written into is read of a copy,
    so that a recogniser may look through what is computed from it, though that runs behind the
    write: the mask of a cache that knows how full it is.

    Before::

        at = aten.add.Tensor(length, 1); aten.add_.Tensor(length, 1)

    After::

        old = aten.clone.default(length)
        at = aten.add.Tensor(old, 1); aten.add_.Tensor(length, 1)

    Left alone: floating-point inputs, whose gradients would go another way, and inputs of which
    some other name, made before the write, is read behind it.

    Returns:
        the number of copies made.
    """
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    writes = [node for node in view.calls(gm) if _may_write(node)]
    if not any(map(view.mutates, writes)):
        return 0
    roots = view.roots(gm)
    begun: dict[Node, int] = {}
    changed = 0
    for write in writes:
        targets = view.mutates(write)
        if len(targets) == 1 and _is_counter(targets[0]):
            (target,) = targets
            if _only_name(target, write, order, roots):
                changed += _copied(gm, target, begun.get(target, -1), write, order)
        for each in targets or write.all_input_nodes:
            begun.update(dict.fromkeys(roots[each], order[write]))
    return changed


def _may_write(node: Node) -> bool:
    """Whether it writes into what it reads, or is no operator: nobody says what that does."""
    told = isinstance(node.target, torch._ops.OpOverload)
    return bool(view.mutates(node)) or not (told or node.target is operator.getitem)


def _is_counter(node: Node) -> bool:
    found = view.value(node)
    if node.op not in ("placeholder", "get_attr") or not isinstance(found, torch.Tensor):
        return False
    if found.dtype.is_floating_point or found.dtype.is_complex:
        return False
    return all(isinstance(size, int) for size in found.shape) and math.prod(found.shape) <= _MOST


def _only_name(
    target: Node, write: Node, order: dict[Node, int], roots: dict[Node, frozenset[Node]]
) -> bool:
    """Whether no other name of the storage goes on being read behind the write."""
    names = [each for each in order if roots[each] & roots[target] and order[each] < order[write]]
    return all(
        order[user] <= order[write] for name in names if name is not target for user in name.users
    )


def _copied(gm: GraphModule, target: Node, since: int, write: Node, order: dict[Node, int]) -> int:
    """Let the readers between two writes read a copy."""
    readers = [
        user for user in target.users if since < order.get(user, since) < order[write]
        and not view.mutates(user)
    ]  # fmt: skip
    if not readers:
        return 0
    copy = rewrite.call(gm, aten.clone.default, (target,), {}, near=min(readers, key=order.get))  # type: ignore[arg-type]
    for reader in readers:
        reader.replace_input_with(target, copy)
    return 1
