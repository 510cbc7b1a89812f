"""What is nearly an attention: a name for what is in the way."""

from __future__ import annotations

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.passes.attention.reading import contraction, rows, scores
from iocompiler.passes.attention.reading.description import Declined, Mix
from iocompiler.passes.attention.reading.rows import Softmax

aten = torch.ops.aten
_JOINS = (aten.cat.default, aten.pad.default, aten.constant_pad_nd.default)
_NEAR = 4  # this far behind a node a softmax, or scores, are looked for


def check_between(node: Node) -> None:
    """Raise where a node that is not understood stands between a softmax and the values.

    Raises:
        Mix: it adds probabilities.
        Declined: it is anything else.
    """
    if not _softmax_near(node):
        return
    if node.target in scores.SUMS:
        raise Mix(node)
    raise Declined(f"{node.target} between the softmax and the second contraction")


def check_unread(node: Node) -> None:
    """Raise `Declined` where scores are near behind what a softmax is of, which are not read."""
    if _softmax_near(node):
        raise Declined("a softmax of a softmax")
    if _widened(node):
        raise Declined("the softmax is over more than the scores, such as a sink beside them")
    unread = _unread(node)
    if unread is not None:
        raise Declined(f"{unread.target} on the scores, at {view.where(unread)}")


def _softmax_near(node: Node, far: int = _NEAR) -> bool:
    if rows.read(node) is not None:
        return _from_scores(rows.read(node))
    if node.op != "call_function" or far == 0 or contraction.read(node) is not None:
        return False
    return any(_softmax_near(read, far - 1) for read in node.all_input_nodes)


def _widened(node: Node, far: int = _NEAR) -> bool:
    """Whether scores, and what is put beside them, are near behind a node."""
    if node.op != "call_function" or far == 0:
        return False
    if node.target in _JOINS:
        return any(scores.read(part) is not None for part in node.all_input_nodes)
    return any(_widened(read, far - 1) for read in node.all_input_nodes)


def _unread(node: Node, far: int = _NEAR) -> Node | None:
    """What is not understood between the softmax and scores near behind it: heads that are mixed,
    say.
    """
    if node.op != "call_function" or far == 0:
        return None
    if any(are_scores(each) for each in node.all_input_nodes):
        return node
    behind = (_unread(each, far - 1) for each in node.all_input_nodes)
    return next((each for each in behind if each is not None), None)


def are_scores(node: Node) -> bool:
    """Whether a node is made of the product of two tensors neither of which is a layer's weight."""
    try:
        found = scores.read(node)
    except Declined:
        return True
    first = found.contraction if found is not None else None
    return first is not None and not any(map(contraction.is_learned, (first.left, first.right)))


def _from_scores(softmax: Softmax | None) -> bool:
    try:
        found = softmax is not None and scores.read(softmax.scores) is not None
    except Declined:
        return True
    return found or (softmax is not None and _unread(softmax.scores) is not None)
