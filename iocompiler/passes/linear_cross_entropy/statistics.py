"""Statistics of each row of the logits: rules for the operators that take them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.sizes import equal, same_sizes
from iocompiler.passes.linear_cross_entropy import loss as losses
from iocompiler.passes.linear_cross_entropy.description import Labels
from iocompiler.passes.linear_cross_entropy.forms import Factor, Form, Term, rows
from iocompiler.passes.linear_cross_entropy.reader import ORDERED, Reader, Rule, base_of, is_wide

aten = torch.ops.aten
_PICKING = (aten.gather.default, aten.take_along_dim.default, aten.index.Tensor)
_LOGITS = {"z": (Term(),)}


def is_picked(matrix: Node) -> bool:
    """Whether something chooses an element of each row of a matrix."""
    for user in matrix.users:
        if user.target in (*losses.TARGETS, *_PICKING):
            return True
        if user.target in (*ORDERED, aten.to.dtype) and is_picked(user):
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


def _gather(reader: Reader, node: Node) -> Form | None:
    source, dim, index = node.args[:3]
    if node.target is aten.take_along_dim.default:
        dim, index = index, dim
    form = reader.form(source)
    if form is None or form.dim is None or not isinstance(index, Node) or dim is None:
        return None
    whole, picked = (view.tensors(each)[0] for each in (source, index))  # type: ignore[arg-type]
    if int(dim) % whole.dim() != form.dim or picked.dim() != whole.dim():  # type: ignore[arg-type]
        return None
    expected = [1 if d == form.dim else size for d, size in enumerate(whole.shape)]
    if not same_sizes(picked.shape, expected) or picked.dtype != torch.int64:
        return None
    reader.labels[node] = Labels(base_of(index))
    return form.picked()


def _index(reader: Reader, node: Node) -> Form | None:
    """``logits[arange(rows), target]``."""
    form = reader.form(node.args[0])
    indices: Any = node.args[1]
    if form is None or form.dim != 1 or len(indices) != 2 or None in indices:
        return None
    counted, target = indices
    whole = view.tensors(node.args[0])[0]  # type: ignore[arg-type]
    values = [view.tensors(each)[0] for each in indices]
    if whole.dim() != 2 or any(v.dim() != 1 or v.dtype != torch.int64 for v in values):
        return None
    if counted.target is not aten.arange.default or not equal(values[0].shape[0], whole.shape[0]):
        return None
    if not equal(values[1].shape[0], whole.shape[0]):
        return None
    reader.labels[node] = Labels(base_of(target), wrapped=True)
    return form.picked()


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
    **dict.fromkeys((aten.gather.default, aten.take_along_dim.default), _gather),
    aten.log_softmax.int: _log_softmax,
    aten.logsumexp.default: _logsumexp,
    aten.index.Tensor: _index,
}
