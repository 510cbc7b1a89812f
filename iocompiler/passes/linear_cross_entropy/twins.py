"""What is done to the rows of the logits, done to the rows of ``x``: a linear works on rows,
wherever they lie.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.passes.linear_cross_entropy.description import Head
from iocompiler.passes.linear_cross_entropy.moves import (
    MOVES,
    TRANSPOSES,
    is_cut,
    order_of,
)

aten = torch.ops.aten


class Twins:
    """For each call of ``path``, through which logits go, the rows of ``x`` as it leaves them.

    Sizes that are read from logits are read from there instead.
    """

    def __init__(self, gm: GraphModule, head: Head, path: Iterable[Node]) -> None:
        self._gm, self._head = gm, head
        self._twins: dict[Node, Node] = {}
        self._dims: dict[Node, int] = {}  # along which the classes lie
        for node in (*head.also, head.node):
            self._enter(node, head.x, view.tensors(node)[0].dim() - 1)
        for node in path:
            self._enter(node, self._twin(node), self._dim(node))

    def rows(self, logits: Node, dim: int, near: Node) -> Node:
        """[T, D], in the order of the rows of ``logits``, whose classes lie along ``dim``."""
        twin = self._twins[logits]
        rank = view.tensors(twin)[0].dim()
        if dim != rank - 1:
            twin = edit.call(self._gm, aten.movedim.int, (twin, dim, -1), {}, near=near)
        if rank > 2:
            shape = [-1, self._width(near)]
            twin = edit.call(self._gm, aten.reshape.default, (twin, shape), {}, near=near)
        return twin

    def _dim(self, node: Node) -> int:
        read: Any = node.args[0]
        if node.target in TRANSPOSES:
            return order_of(node).index(self._dims[read])
        moved = node.target in MOVES and not is_cut(node, self._dims[read])
        return view.tensors(node)[0].dim() - 1 if moved else self._dims[read]

    def _twin(self, node: Node) -> Node:
        read: Any = node.args[0]
        before = self._twins[read]
        if node.target not in (*MOVES, *TRANSPOSES) or is_cut(node, self._dims[read]):
            return before
        arguments: Any = list(node.args[1:])
        if node.target is aten.reshape.default:
            arguments[0] = [*arguments[0][:-1], self._width(node)]
        given = (before, *arguments)
        return edit.call(self._gm, node.target, given, dict(node.kwargs), near=node)

    def _enter(self, node: Node, twin: Node, classes: int) -> None:
        """Sizes read from ``node`` are those of its twin, but for the ``classes``."""
        self._twins[node], self._dims[node] = twin, classes
        value = view.tensors(node)[0]
        for user in list(node.users):
            if user.target is not aten.sym_size.int:
                continue
            dim: Any = user.args[1]
            if isinstance(value.shape[dim], int):
                continue
            edit.respell(user, aten.sym_size.int, (twin, dim))  # a form may name the node

    def _width(self, near: Node) -> Any:
        """The size of a row: a number, or a node where it is symbolic."""
        size: Any = view.tensors(self._head.x)[0].shape[-1]
        if isinstance(size, int):
            return size
        return edit.call(self._gm, aten.sym_size.int, (self._head.x, -1), {}, near=near)
