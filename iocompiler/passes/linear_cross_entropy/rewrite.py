"""The pass: recognise, check that nobody else needs the logits, put the operator in place."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.graph.findings import Miss, Rewrite, record
from iocompiler.graph.match import graph_pass
from iocompiler.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from iocompiler.passes.linear_cross_entropy import head as heads
from iocompiler.passes.linear_cross_entropy import loss as losses
from iocompiler.passes.linear_cross_entropy.description import Declined, Head, Loss

aten = torch.ops.aten
_PATTERN = "linear_cross_entropy"
# logits that stay in a large L2 cost no traffic, and little memory
LEAST_BYTES = 32 << 20


@graph_pass
def linear_cross_entropy(gm: GraphModule) -> int:
    """A linear head and its cross-entropy in chunks: the logits are never whole in memory.

    Before::

        l = aten.to.dtype(aten.linear.default(x, w), torch.float32)
        loss = aten.cross_entropy_loss.default(aten.reshape.default(l, [-1, 32000]), y)

    After::

        loss = iocompiler.linear_cross_entropy(aten.reshape.default(x, [-1, 2048]), w, None, y,
                                               -100, 0.0, 1.0, 1.0, False, "mean")
    """
    return replace_losses(gm, LEAST_BYTES)


def replace_losses(gm: GraphModule, least_bytes: int) -> int:
    """The pass for logits of at least ``least_bytes`` (a symbolic size counts as large)."""
    changed = 0
    for node in list(view.calls(gm, *losses.TARGETS)):
        try:
            found = _recognised(gm, node, least_bytes)
        except Declined as reason:
            record(gm, Miss(_PATTERN, view.where(node), str(reason)))
            continue
        if found is not None:
            record(gm, Rewrite(_PATTERN, view.where(node), _variant(*found)))
            _replace(gm, *found)
            changed += 1
    return changed


def _recognised(gm: GraphModule, node: Node, least_bytes: int) -> tuple[Loss, Head] | None:
    try:
        loss = losses.read(node)
    except Declined:
        logits = node.args[0]
        if isinstance(logits, Node) and heads.linear_near(logits):
            raise
        return None
    head = heads.read(loss.logits, loss.dim) if loss is not None else None
    if loss is None or head is None:
        return None
    if view.tensors(loss.target)[0].device != view.tensors(head.x)[0].device:
        raise Declined("the targets are on another device")
    interior = [*head.also, head.node, *head.path, *loss.nodes]
    _check_alone(interior, loss.node)
    _check_order(gm, interior, loss, head)
    _check_price(head, least_bytes)
    return loss, head


def _variant(loss: Loss, head: Head) -> str:
    parts = [loss.reduction]
    parts += ["bias"] if head.bias is not None else []
    parts += ["soft-cap"] if head.capped else []
    parts += ["label smoothing"] if loss.smoothing else []
    return ", ".join(parts)


def _check_alone(interior: list[Node], last: Node) -> None:
    inside = {*interior, last}
    for node in interior:
        for user in node.users:
            if user not in inside and user.target is not aten.sym_size.int:
                kind = "returned" if user.op == "output" else "used"
                raise Declined(f"the logits are {kind} elsewhere: {view.where(node) or node.name}")


def _check_order(gm: GraphModule, interior: list[Node], loss: Loss, head: Head) -> None:
    regions = view.regions(gm)
    if len({regions[node].grad for node in (*interior, loss.node)}) > 1:
        raise Declined("grad mode changes between the head and the loss")
    writes = [node for node in gm.graph.nodes if view.mutates(node)]
    if not writes:
        return
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    roots = view.roots(gm)
    read = [each for each in (head.x, head.weight, head.bias) if each is not None]
    storages = frozenset().union(*(roots[node] for node in (*read, *interior)))
    for node in writes:
        between = order[interior[0]] <= order[node] <= order[loss.node]
        if between and any(roots[written] & storages for written in view.mutates(node)):
            raise Declined(f"{view.where(node) or node.name} writes in between")


def _check_price(head: Head, least_bytes: int) -> None:
    value = view.tensors(head.node)[0]
    if not all(isinstance(size, int) for size in value.shape):
        return
    size = value.numel() * value.element_size()
    if size < least_bytes:
        raise Declined(f"the logits take {size} bytes < {least_bytes}: they stay in the cache")


def _replace(gm: GraphModule, loss: Loss, head: Head) -> None:
    node = loss.node

    def call(target: Any, *args: Any) -> Node:
        return edit.call(gm, target, args, {}, near=node)

    x, weight = _rows(gm, loss, head), head.weight
    if head.transposed:
        weight = call(aten.transpose.int, weight, 0, 1)
    rank = view.tensors(x)[0].dim()
    target = loss.target
    shape = list(view.tensors(target)[0].shape)
    if rank > 2:
        width = _width(gm, x, node)
        sizes = [
            s if isinstance(s, int) else call(aten.sym_size.int, target, d)
            for d, s in enumerate(shape)
        ]
        x = call(aten.reshape.default, x, [-1, width])
        target = call(aten.reshape.default, target, [-1])
    setting = (loss.ignore_index, loss.smoothing, head.outer, head.inner, head.capped)
    new = call(
        LINEAR_CROSS_ENTROPY, x, weight, head.bias, target, None, None, *setting, loss.reduction
    )
    if rank > 2 and loss.reduction == "none":
        new = call(aten.reshape.default, new, sizes)
    wanted = view.tensors(node)[0].dtype
    if view.tensors(new)[0].dtype != wanted:
        new = call(aten.to.dtype, new, wanted)
    edit.redirect(gm, node, new)


def _rows(gm: GraphModule, loss: Loss, head: Head) -> Node:
    """``x`` moved as the logits were, classes last: a linear works on rows, wherever they lie."""
    x = head.x
    width = _width(gm, x, loss.node)
    _move_sizes(gm, (*head.also, head.node), x, loss.node)
    twin = x
    for node in head.path:
        if node in head.views:
            arguments: Any = list(node.args[1:])
            if node.target is aten.reshape.default:
                arguments[0] = [*arguments[0][:-1], width]
            twin = edit.call(gm, node.target, (twin, *arguments), dict(node.kwargs), near=loss.node)
        _move_sizes(gm, (node,), twin, loss.node)
    if loss.dim != view.tensors(twin)[0].dim() - 1:
        twin = edit.call(gm, aten.movedim.int, (twin, loss.dim, -1), {}, near=loss.node)
    return twin


def _width(gm: GraphModule, x: Node, near: Node) -> Any:
    """The size of the last dim: a number, or a node where it is symbolic."""
    size: Any = view.tensors(x)[0].shape[-1]
    if isinstance(size, int):
        return size
    return edit.call(gm, aten.sym_size.int, (x, -1), {}, near=near)


def _move_sizes(gm: GraphModule, nodes: tuple[Node, ...], twin: Node, near: Node) -> None:
    """Sizes read from the logits are those of ``x``, but for the classes."""
    for node in nodes:
        value = view.tensors(node)[0]
        for user in list(node.users):
            if user.target is not aten.sym_size.int:
                continue
            dim: Any = user.args[1]
            if isinstance(value.shape[dim], int):
                continue
            source = edit.call(gm, aten.sym_size.int, (twin, dim), {}, near=user)
            edit.bypass(gm, user, source)
