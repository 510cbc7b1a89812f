"""Statistics taken batch by batch in a loop, and stacked: taken of all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.graph.sizes import equal

aten = torch.ops.aten
# operators of a batch that are the same of all, and where their dims stand among the arguments
_DIMS: dict[Any, int | None] = {
    aten.logsumexp.default: 1,
    aten.log_softmax.int: 1,
    aten.gather.default: 1,
    aten.unsqueeze.default: 1,
    aten.squeeze.dim: 1,
    aten.neg.default: None,
    aten.to.dtype: None,
}
_STATISTICS = (aten.logsumexp.default, aten.log_softmax.int)


def take_together(gm: GraphModule) -> None:
    """``stack([logsumexp(z[0], -1), logsumexp(z[1], -1)])``  -->  ``logsumexp(z, -1)``, as programs
    write it that would spare memory: of logits that are never whole, there is nothing to spare.
    """
    stacks = list(view.calls(gm, aten.stack.default))
    if not stacks:
        return
    roots, regions = view.roots(gm), view.regions(gm)
    written = view.written(gm, roots)
    for stack in stacks:
        parts: Any = stack.args[0]
        if len(stack.args) > 1 or stack.kwargs or len(parts) < 2:
            continue

        def is_plain(node: Node, stack: Node = stack) -> bool:
            return not roots[node] & written and regions[node] == regions[stack]

        found = _lifted(parts, is_plain)
        if found is not None and any(node.target in _STATISTICS for node in _behind(parts[0])):
            edit.redirect(gm, stack, found(gm, stack))


def _behind(node: Node) -> list[Node]:
    """The calls that ``node`` is made by, up to where its batch is chosen."""
    if node.target not in _DIMS:
        return []
    return [node, *(each for read in node.all_input_nodes for each in _behind(read))]


def _lifted(
    parts: Sequence[Any], is_plain: Callable[[Node], bool]
) -> Callable[[GraphModule, Node], Node] | None:
    """What makes the stack of ``parts``, before a node, of what they are chosen from; None where
    they are not the same of one batch after the other.
    """
    first = parts[0]
    if not all(isinstance(each, Node) and is_plain(each) for each in parts):
        return None
    if first.target is aten.select.int:
        source = first.args[0]
        whole = equal(view.tensors(source)[0].shape[0], len(parts))
        in_order = all(
            each.target is aten.select.int and each.args == (source, 0, place)
            for place, each in enumerate(parts)
        )
        return (lambda gm, near: source) if whole and in_order and is_plain(source) else None
    target = first.target
    if target not in _DIMS or any(
        each.target is not target or each.kwargs or len(each.users) != 1 for each in parts
    ):
        return None
    columns = list(zip(*(each.args for each in parts), strict=False))
    if any(len(each.args) != len(columns) for each in parts):
        return None
    makers: list[Any] = []
    for column in columns:
        if any(isinstance(each, Node) for each in column):
            maker = _lifted(column, is_plain)
            if maker is None:
                return None
            makers.append(maker)
        elif any(each != column[0] for each in column):
            return None
        else:
            makers.append(column[0])
    place = _DIMS[target]
    if place is not None:
        makers[place] = _one_more(makers[place], view.tensors(first.args[0])[0].dim(), target)

    def make(gm: GraphModule, near: Node) -> Node:
        given = tuple(each(gm, near) if callable(each) else each for each in makers)
        return edit.call(gm, target, given, {}, near=near)

    return make


def _one_more(dims: Any, rank: int, target: Any) -> Any:
    """The dims of a tensor of ``rank``, with the batch before them."""
    if isinstance(dims, (list, tuple)):
        return [_one_more(each, rank, target) for each in dims]
    return dims % (rank + (target is aten.unsqueeze.default)) + 1
