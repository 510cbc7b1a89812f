"""From what logits are compared with back to what it is made of: another head, or what is given."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.passes.linear_cross_entropy import head as heads
from iocompiler.passes.linear_cross_entropy import moves
from iocompiler.passes.linear_cross_entropy.description import Declined, Distribution, Head

aten = torch.ops.aten
_SAME = (*heads.COPIES, aten.detach.default)
_MOVING = (*moves.TRANSPOSES, *(each for each in moves.MOVES if each not in moves.RESHAPES))
_PROBABILITIES, _LOGS, _LOGITS = "probabilities", "log-probabilities", "logits"
# what a call makes, of what
_STEPS: dict[tuple[str, Any], str] = {
    (_PROBABILITIES, aten.softmax.int): _LOGITS,
    (_LOGS, aten.log_softmax.int): _LOGITS,
    (_PROBABILITIES, aten.exp.default): _LOGS,
    (_LOGS, aten.log.default): _PROBABILITIES,
}


def read(node: Node, dim: int, *, logs: bool, fixed: bool) -> Distribution | None:
    """The distribution, or its logarithms (``logs``), that ``node`` holds for each row; None where
    it is learned, and is no softmax of a head's logits.

    Args:
        dim: along which the classes lie.
        fixed: whether no gradient flows into it.
    """
    if not view.tensors(node)[0].is_floating_point():
        return None
    kind, at, place = _LOGS if logs else _PROBABILITIES, node, dim
    path: list[Node] = []
    sign = 1.0
    while at.target is aten.neg.default:
        path.append(at)
        at, sign = at.args[0], -sign  # type: ignore[assignment]
    given = (at, dim, kind, 1.0)
    head: Head | None = None
    while True:
        found = _before(at, place, kind)
        if found is None:
            break
        path.append(at)
        at, place, kind = found
        if not any(each.target in _MOVING for each in path):
            given = (at, place, kind, 1.0)
        if kind == _LOGITS:
            head = _head(at, place)
            given = _unscaled(*given)
            break
    if head is None and not fixed:
        return None
    calls = () if head is None else (*head.path, *reversed(path))
    return Distribution(node, dim, sign, fixed, *given, head, calls, moves.rows(calls))


def _before(node: Node, dim: int, kind: str) -> tuple[Node, int, str] | None:
    """What a call is made of: (node, along which dim its classes lie, the kind it holds)."""
    read = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(read, Node):
        return None
    step = _STEPS.get((kind, node.target))
    if step == _LOGITS:
        over: Any = node.args[1]
        rank = view.tensors(node)[0].dim()
        return (read, dim, step) if over % rank == dim and _is_cast_wider(node) else None
    if step is not None or node.target in _SAME:
        return read, dim, step or kind
    try:
        if node.target is aten.to.dtype:
            heads.check_cast(node)
            return read, dim, kind
        if node.target in moves.MOVES:
            moves.check_move(node, dim)
            return read, view.tensors(read)[0].dim() - 1, kind
    except Declined:
        return None
    return (read, moves.order_of(node)[dim], kind) if node.target in moves.TRANSPOSES else None


def _is_cast_wider(node: Node) -> bool:
    old, new = view.tensors(node.args[0])[0], view.tensors(node)[0]  # type: ignore[arg-type]
    return new.dtype.itemsize >= old.dtype.itemsize


def _head(logits: Node, dim: int) -> Head | None:
    try:
        return heads.read(logits, dim, aten.detach.default)
    except Declined:
        return None


def _unscaled(node: Node, dim: int, kind: str, outer: float) -> tuple[Node, int, str, float]:
    """Logits before they are multiplied and cast."""
    while kind == _LOGITS and node.op == "call_function":
        number = heads.factor(node)
        if number is None and node.target not in (*_SAME, aten.to.dtype):
            break
        read: Any = node.args[0]
        if node.target is aten.to.dtype:
            try:
                heads.check_cast(node)
            except Declined:
                break
        node, outer = read, outer * (number or 1.0)
    return node, dim, kind, outer
