"""From a call that ends a loss to the cross-entropy it is."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.passes.linear_cross_entropy.description import Declined, Loss

aten = torch.ops.aten
_REDUCTIONS = ("none", "mean", "sum")
_NLL = (aten.nll_loss.default, aten.nll_loss_nd.default, aten.nll_loss2d.default)
TARGETS = (aten.cross_entropy_loss.default, *_NLL)


def read(node: Node) -> Loss | None:
    """The loss that ``node`` computes, or None where it is the loss of no log-softmax.

    Raises:
        Declined: it is a cross-entropy of a kind that is not taken.
    """
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    names = [a.name for a in target._schema.arguments]
    given: dict[str, Any] = dict(zip(names, view.spelled_out(node), strict=True))
    logits: Node = given["self"]
    nodes: tuple[Node, ...] = ()
    if node.target in _NLL:
        softmax = logits
        if softmax.target is not aten.log_softmax.int:
            return None
        logits, dim, nodes = softmax.args[0], int(softmax.args[1]), (softmax,)  # type: ignore[assignment,arg-type]
        value = view.tensors(softmax)[0]
        if dim % value.dim() != _class_dim(value):
            raise Declined("the log-softmax is over another dim than the classes")
        if value.dtype != view.tensors(logits)[0].dtype:
            raise Declined("the log-softmax has a dtype of its own")
    _check(given, logits)
    return Loss(
        node,
        logits,
        given["target"],
        _class_dim(view.tensors(logits)[0]),
        _REDUCTIONS[given["reduction"]],
        int(given["ignore_index"]),
        float(given.get("label_smoothing", 0.0)),
        nodes,
    )


def _class_dim(value: torch.Tensor) -> int:
    return min(1, value.dim() - 1)


def _check(given: dict[str, Any], logits: Node) -> None:
    target = view.tensors(given["target"])[0]
    if given["weight"] is not None:
        raise Declined("the classes have weights")
    if target.dtype != torch.int64:
        raise Declined("the targets are no class numbers")
    if view.tensors(logits)[0].dim() < 2:
        raise Declined("a single row")
    if target.dim() != view.tensors(logits)[0].dim() - 1:
        raise Declined("the targets do not go with the rows")
    for name in ("ignore_index", "reduction"):
        if not isinstance(given[name], int):
            raise Declined(f"{name} is known only at run time")
