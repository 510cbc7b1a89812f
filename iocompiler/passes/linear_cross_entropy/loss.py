"""Calls of a loss: their arguments, and which of them are taken."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.passes.linear_cross_entropy.description import Declined, Labels

aten = torch.ops.aten
NONE, MEAN, SUM = range(3)
_NLL = (aten.nll_loss.default, aten.nll_loss_nd.default, aten.nll_loss2d.default)
TARGETS = (aten.cross_entropy_loss.default, *_NLL)


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a loss, by the names of its schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [a.name for a in node.target._schema.arguments]
    return dict(zip(names, view.spelled_out(node), strict=True))


def class_dim(logits: Node) -> int:
    """Where a loss looks for the classes."""
    return min(1, view.tensors(logits)[0].dim() - 1)


def is_soft(given: dict[str, Any]) -> bool:
    """Whether the targets are a probability for each class."""
    target, logits = (view.tensors(given[name])[0] for name in ("target", "self"))
    return target.is_floating_point() and target.dim() == logits.dim()


def labels(given: dict[str, Any]) -> Labels:
    """The targets of a loss with the arguments ``given``.

    Raises:
        Declined: it is a cross-entropy of a kind that is not taken.
    """
    target, logits = (view.tensors(given[name])[0] for name in ("target", "self"))
    if target.dtype != torch.int64:
        raise Declined("the targets are no class numbers")
    if logits.dim() < 2:
        raise Declined("a single row")
    if target.dim() != logits.dim() - 1:
        raise Declined("the targets do not go with the rows")
    for name in ("ignore_index", "reduction"):
        if not isinstance(given[name], int):
            raise Declined(f"{name} is known only at run time")
    smoothing = float(given.get("label_smoothing", 0.0))
    if smoothing and given["weight"] is not None:
        raise Declined("class weights with label smoothing")
    return Labels(given["target"], False, int(given["ignore_index"]), smoothing)
