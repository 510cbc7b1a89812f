"""Statistics of each row of the logits: rules for the operators that take them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.passes.linear_cross_entropy import loss as losses
from iocompiler.passes.linear_cross_entropy.forms import Factor, Form, Term, rows
from iocompiler.passes.linear_cross_entropy.picks import PICKING
from iocompiler.passes.linear_cross_entropy.reader import ORDERED, Reader, Rule, is_wide

aten = torch.ops.aten
_BETWEEN = (*ORDERED, aten.to.dtype)
_LOGITS = {"z": (Term(),)}


def is_picked(matrix: Node) -> bool:
    """Whether something chooses an element of each row of a matrix."""
    for user in matrix.users:
        if user.target in (*losses.TARGETS, *PICKING):
            return True
        if user.target in _BETWEEN and is_picked(user):
            return True
    return False


def has_logarithm(probabilities: Node) -> bool:
    """Whether logarithms are taken of probabilities, or of those that are picked."""
    for user in probabilities.users:
        if user.target is aten.log.default:
            return True
        if user.target in (*_BETWEEN, *PICKING) and has_logarithm(user):
            return True
    return False


def _log_softmax(reader: Reader, node: Node) -> Form | None:
    form = reader.form(node.args[0])
    if form is None or form.terms != _LOGITS or not is_wide(node):
        return None
    dim: Any = node.args[1]
    if dim % view.tensors(node)[0].dim() != form.dim:
        return None
    return form.plus(rows(None, lse=-1.0))


def _logsumexp(reader: Reader, node: Node) -> Form | None:
    form = reader.form(node.args[0])
    if form is None or form.terms != _LOGITS:
        return None
    dims: Any = node.args[1]
    rank = view.tensors(node.args[0])[0].dim()  # type: ignore[arg-type]
    return rows(form.outer, lse=1.0) if [d % rank for d in dims] == [form.dim] else None


def _logarithm(reader: Reader, node: Node) -> Form | None:
    """Of a softmax, whole or at the targets."""
    form = reader.form(node.args[0])
    if form is None or form.reduced or form.terms != {"q": (Term(),)} or not is_wide(node):
        return None
    logit = rows(None, z=1.0) if form.dim is not None else rows(None, chosen=1.0)
    return replace(form, terms={**logit.terms, "lse": (Term(-1.0),)})


def _loss(reader: Reader, node: Node) -> Form | None:
    given = losses.arguments(node)
    if losses.is_soft(given):
        return None
    form = reader.form(given["self"])
    expected = {"z"} if node.target is aten.cross_entropy_loss.default else {"z", "lse"}
    if form is None or set(form.terms) != expected or form.dim != losses.class_dim(given["self"]):
        return None
    if form.terms["z"] != (Term(),) or form.terms.get("lse", (Term(-1.0),)) != (Term(-1.0),):
        return None
    reader.labels[node] = losses.labels(given)
    reduction, weight = given["reduction"], given["weight"]
    found = rows(form.outer, cross=1.0)
    if weight is not None:
        found = found.times(1.0, Factor("class", weight))
    if reduction == losses.MEAN:
        found = found.times(1.0, Factor("kept") if weight is None else Factor("classes", weight))
    return replace(found, reduced=reduction != losses.NONE)


RULES: dict[Any, Rule] = {
    **dict.fromkeys(losses.TARGETS, _loss),
    aten.log_softmax.int: _log_softmax,
    aten.logsumexp.default: _logsumexp,
    aten.log.default: _logarithm,
}
