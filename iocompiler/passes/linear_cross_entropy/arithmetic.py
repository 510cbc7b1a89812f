"""Arithmetic on statistics of rows: sums of them, times numbers and tensors without a gradient.

Rows keep their order through all of it: an operator that moves, drops or repeats rows ends what is
understood.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.sizes import equal, same_sizes
from iocompiler.passes.linear_cross_entropy.forms import Factor, Form
from iocompiler.passes.linear_cross_entropy.moves import TRANSPOSES, order_of
from iocompiler.passes.linear_cross_entropy.reader import (
    ORDERED,
    Reader,
    Rule,
    are_alike,
    is_wide,
    keeps_all,
)

aten = torch.ops.aten
# of a matrix, those that may keep the classes last
_REGROUPED = (
    aten.reshape.default, aten.flatten.using_ints, aten.contiguous.default, aten.clone.default,
    aten.alias.default, aten.to.dtype, aten.unsqueeze.default, aten.squeeze.dim,
)  # fmt: skip


# matrices that `divergence.RULES` knows
_OTHERS = {"q", "logp", "each"}


def _added(sign: float) -> Rule:
    def rule(reader: Reader, node: Node) -> Form | None:
        first, second = (reader.form(x) for x in node.args[:2])
        if first is None or second is None or node.kwargs or first.reduced != second.reduced:
            return None
        if not first.agrees(second):
            return None
        if first.dim is None and second.dim is None:
            return first.plus(second, sign) if are_alike(node, *node.args[:2]) else None
        if first.dim is None or second.dim is not None or not is_wide(node) or first.is_picked:
            return None
        # a number each row, beside the row's logits
        whole, row = (view.tensors(each)[0].shape for each in node.args[:2])  # type: ignore[arg-type]
        expected = [1 if d == first.dim else size for d, size in enumerate(whole)]
        return first.plus(second, sign) if same_sizes(row, expected) else None

    return rule


def _multiplied(reader: Reader, node: Node) -> Form | None:
    first, second = node.args[:2]
    one, two = reader.row_form(first), reader.row_form(second)
    if one is not None and two is not None:
        return one.product(two) if are_alike(node, first, second) else None
    form, other, of = one, second, first
    if form is None:
        form, other, of = two, first, second
    return _scaled(reader, node, form, other, of, "times")


def _divided(reader: Reader, node: Node) -> Form | None:
    first, second = node.args[:2]
    return _scaled(reader, node, reader.row_form(first), second, first, "over")


def _scaled(
    reader: Reader, node: Node, form: Form | None, other: Any, of: Any, kind: Any
) -> Form | None:
    if form is None or node.kwargs or not are_alike(node, of):
        return None
    found = reader.factor(other, of, kind)
    return form.times(found[0], *found[1]) if found is not None else None


def _negated(reader: Reader, node: Node) -> Form | None:
    form = reader.form(node.args[0])
    return form.times(-1.0) if form is not None and not set(form.terms) & _OTHERS else None


def _squared(reader: Reader, node: Node) -> Form | None:
    form = reader.row_form(node.args[0])
    return form.product(form) if form is not None else None


def _power(reader: Reader, node: Node) -> Form | None:
    return _squared(reader, node) if node.args[1] == 2 else None


def _masked(reader: Reader, node: Node) -> Form | None:
    """``masked_fill(rows, mask, 0)``, ``where(mask, rows, 0)``."""
    if node.target is aten.masked_fill.Scalar:
        inside, mask, outside = node.args
        kind = "unless"
    else:
        mask, inside, outside = node.args
        kind = "where"
    form = reader.row_form(inside)
    if form is None or form.reduced or not _is_nothing(outside):
        return None
    if view.tensors(mask)[0].dtype != torch.bool:  # type: ignore[arg-type]
        return None
    return _scaled(reader, node, form, mask, inside, kind)


def _is_nothing(x: Any) -> bool:
    if not isinstance(x, Node):
        return isinstance(x, (int, float)) and not x
    if x.target is aten.scalar_tensor.default:
        return bool(x.args[0] == 0)
    return x.target in (aten.zeros_like.default, aten.zeros.default)


def _kept(reader: Reader, node: Node) -> Form | None:
    """Rows in another shape, or another dtype; a matrix whose classes stay last."""
    form = reader.form(node.args[0])
    if form is None or not view.tensors(node)[0].is_floating_point():
        return None
    if form.dim is not None:
        old, new = view.tensors(node.args[0])[0], view.tensors(node)[0]  # type: ignore[arg-type]
        last = form.dim == old.dim() - 1 and equal(old.shape[-1], new.shape[-1])
        taken = last and node.target in _REGROUPED and is_wide(node)
        return replace(form, dim=new.dim() - 1) if taken else None
    return form if node.target is not aten.select.int or keeps_all(node) else None


def _turned(reader: Reader, node: Node) -> Form | None:
    """A matrix whose classes move; its rows stay in order."""
    form = reader.form(node.args[0])
    if form is None or form.dim is None:
        return None
    order = order_of(node)
    rows_ = [dim for dim in order if dim != form.dim]
    return replace(form, dim=order.index(form.dim)) if rows_ == sorted(rows_) else None


def _summed(reader: Reader, node: Node) -> Form | None:
    form = reader.form(node.args[0])
    if form is None or form.reduced or not view.tensors(node)[0].is_floating_point():
        return None
    read = view.tensors(node.args[0])[0]  # type: ignore[arg-type]
    rank, means = read.dim(), node.target in (aten.mean.default, aten.mean.dim)
    given: Any = node.args[1] if node.target in (aten.sum.dim_IntList, aten.mean.dim) else None
    dims = {d % rank for d in given or range(rank)}
    if form.dim is not None:
        if form.dim not in dims or equal(read.shape[form.dim], 0) or not is_wide(node):
            return None
        form = form.over_classes(read.shape[form.dim], means=means)
        if form is None or len(dims) == 1 < rank:
            return form
    if len(dims) != rank:
        return None
    total = form.times(1.0, Factor("rows")) if means else form
    return replace(total, reduced=True)


RULES: dict[Any, Rule] = {
    **dict.fromkeys((*ORDERED, aten.to.dtype), _kept),
    **dict.fromkeys(
        (aten.sum.default, aten.mean.default, aten.sum.dim_IntList, aten.mean.dim), _summed
    ),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _multiplied),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _divided),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.where.ScalarOther, aten.where.self), _masked),
    **dict.fromkeys(TRANSPOSES, _turned),
    aten.add.Tensor: _added(1.0),
    aten.sub.Tensor: _added(-1.0),
    aten.neg.default: _negated,
    aten.square.default: _squared,
    aten.pow.Tensor_Scalar: _power,
}
