"""Rows chosen of log-probabilities: chosen of the logits, whose rows a head can leave out."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.passes.linear_cross_entropy import moves
from iocompiler.passes.linear_cross_entropy.description import Declined
from iocompiler.passes.linear_cross_entropy.statistics import is_picked

aten = torch.ops.aten
_CHOOSING = (aten.slice.Tensor, aten.select.int)


def choose_rows_first(gm: GraphModule) -> None:
    """``log_softmax(z, -1)[:, :-1]``  -->  ``log_softmax(z[:, :-1], -1)``, where nobody reads the
    other rows and a class of each row is picked.
    """
    regions = view.regions(gm)
    for node in view.calls(gm, aten.log_softmax.int):
        region = regions[node]
        while (move := _only_move(node)) is not None and regions[move] == region:
            logits, _, *rest = node.args
            # where the log-softmax stands: the logits may be written behind it
            chosen = edit.call(gm, move.target, (logits, *move.args[1:]), {}, near=node)
            again = edit.call(gm, node.target, (chosen, -1, *rest), node.kwargs, near=node)
            edit.redirect(gm, move, again)
            node = again


def _only_move(node: Node) -> Node | None:
    """The only call that reads log-probabilities, if it chooses rows."""
    if len(node.users) != 1:
        return None
    (move,) = node.users
    dim: Any = node.args[1]
    if move.target not in _CHOOSING or move.all_input_nodes != [node]:
        return None
    if dim % view.tensors(node)[0].dim() != _last(node):
        return None
    try:
        moves.check_move(move, _last(move))
    except Declined:
        return None
    return move if is_picked(move) else None


def _last(node: Node) -> int:
    return view.tensors(node)[0].dim() - 1
