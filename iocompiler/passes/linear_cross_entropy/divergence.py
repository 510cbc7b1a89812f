"""Divergences of the logits from another distribution: rules for the operators they are made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.sizes import equal
from iocompiler.passes.linear_cross_entropy import loss as losses
from iocompiler.passes.linear_cross_entropy.description import (
    NEVER,
    Comparison,
    Declined,
    Labels,
)
from iocompiler.passes.linear_cross_entropy.forms import Factor, Form, Term
from iocompiler.passes.linear_cross_entropy.picks import one_hot
from iocompiler.passes.linear_cross_entropy.reader import Reader, Rule, are_alike, is_wide

aten = torch.ops.aten
_LEARNED = "what the logits are compared with is learned, or hangs on them, and no head makes it"


def is_compared(matrix: Node) -> bool:
    """Whether a divergence reads a matrix of probabilities or of their logarithms."""
    return any(user.target is aten.kl_div.default for user in matrix.users)


def _softmax(reader: Reader, node: Node) -> Form | None:
    form = reader.form(node.args[0])
    if form is None or form.terms != {"z": (Term(),)} or not is_wide(node):
        return None
    dim: Any = node.args[1]
    return _q(form) if dim % view.tensors(node)[0].dim() == form.dim else None


def _exponential(reader: Reader, node: Node) -> Form | None:
    form = reader.form(node.args[0])
    return _q(form) if form is not None and form.logarithm() == 1.0 else None


def _q(form: Form) -> Form:
    return replace(form, terms={"q": (Term(),)})


def _kl_div(reader: Reader, node: Node) -> Form | None:
    given = view.named(node)
    logs, mine, theirs = bool(given["log_target"]), given["self"], given["target"]
    form, other, how = reader.form(mine), theirs, False
    if form is None or form.logarithm() != 1.0:
        form, other, how = reader.form(theirs), mine, True
        if form is None or not (form.logarithm() == 1.0 if logs else _is_q(form)):
            return None
    if form.dim is None or not (are_alike(mine, theirs)):
        return None
    # what is entered stands for the matrix, whatever is summed of it
    if reader.other(mine, other, form.dim, logs=how or logs, at=node) != 1.0:
        raise Declined(_LEARNED)
    each = _compared(reader, node, form, 1.0, reversed_=how)
    reduction = given["reduction"]
    if reduction == losses.NONE:
        return each
    return _total(each, mine, means=reduction == losses.MEAN)


def _is_q(form: Form) -> bool:
    return form.terms == {"q": (Term(),)}


def _compared(
    reader: Reader,
    node: Node,
    form: Form,
    number: float,
    *,
    entropy: bool = True,
    reversed_: bool = False,
    spread: float = 0.0,
) -> Form:
    """The summands, times a number, of a divergence of probabilities of the logits of ``form``."""
    assert form.outer is not None
    reader.divergences[node] = Comparison(form.outer, entropy, reversed_, spread)
    return Form({"each": (Term(number),)}, dim=form.dim)


def _soft_targets(reader: Reader, node: Node) -> Form | None:
    """``cross_entropy(logits, probabilities)``."""
    given = losses.arguments(node)
    form = reader.form(given["self"])
    if not losses.is_soft(given) or form is None or form.dim is None:
        return None
    if form.terms != {"z": (Term(),)} or form.dim != losses.class_dim(given["self"]):
        return None
    if given["weight"] is not None:
        raise Declined("class weights with soft targets")
    logits, target, smoothing = given["self"], given["target"], float(given["label_smoothing"])
    picked = one_hot(target, form.dim) if are_alike(logits, target) else None
    if picked is not None:
        reader.labels[node] = Labels(picked, ignore_index=NEVER, smoothing=smoothing)
        return _over_rows(Form({"cross": (Term(),)}, outer=form.outer), given["reduction"])
    if reader.other(logits, target, form.dim, logs=False, at=node) != 1.0:
        raise Declined(_LEARNED)
    other = reader.others[node]
    if smoothing and (other.head is not None or other.kind != "probabilities"):
        raise Declined("label smoothing of soft targets that are computed from logits")
    _compared(reader, node, form, 1.0, entropy=False, spread=smoothing)
    return _over_rows(Form({"divergence": (Term(),)}), given["reduction"])


def _over_rows(found: Form, reduction: int) -> Form:
    if reduction == losses.MEAN:
        found = found.times(1.0, Factor("rows"))
    return replace(found, reduced=reduction != losses.NONE)


def _met(reader: Reader, node: Node) -> Form | None:
    """Logarithms times probabilities."""
    if node.kwargs or len(node.all_input_nodes) != 2 or not are_alike(node, *node.args[:2]):
        return None
    for mine, theirs in (node.args[:2], reversed(node.args[:2])):
        form, beside = reader.form(mine), reader.form(theirs)
        if form is None or form.dim is None:
            continue
        number, gap = form.logarithm(), set(form.terms) == {"z", "lse", "logp"}
        if gap:
            number = -form.terms["logp"][0].number
        if beside is not None:
            if gap and number is not None and _is_q(beside) and beside.outer == form.outer:
                return _compared(reader, node, form, number, reversed_=True)
        elif number is not None:
            sign = reader.other(node, theirs, form.dim, logs=False)
            return _compared(reader, node, form, -number * sign, entropy=gap) if sign else None
        elif _is_q(form):
            sign = reader.other(node, theirs, form.dim, logs=True)
            how = {"entropy": False, "reversed_": True}
            return _compared(reader, node, form, -sign, **how) if sign else None
    return None


def _difference(reader: Reader, node: Node) -> Form | None:
    """Of the logarithms of two distributions."""
    first, second = node.args[:2]
    for mine, theirs, sign in ((first, second, 1.0), (second, first, -1.0)):
        form = reader.form(mine)
        if form is None or form.dim is None or reader.form(theirs) is not None or node.kwargs:
            continue
        if form.logarithm() != 1.0 or not (are_alike(node, mine) and isinstance(theirs, Node)):
            continue
        if reader.other(node, theirs, form.dim, logs=True) == 1.0:
            return form.times(sign).plus(Form({"logp": (Term(-sign),)}))
    return None


def _shared(kind: Any) -> Rule:
    """Summands times a number, or a number for each row."""

    def rule(reader: Reader, node: Node) -> Form | None:
        for mine, theirs in (node.args[:2], reversed(node.args[:2])):
            form = _one_by_one(reader, mine)
            if form is not None and not node.kwargs and are_alike(node, mine):
                return _times(reader, form, theirs, mine, kind)
            if kind == "over":
                break
        return None

    return rule


def _masked(reader: Reader, node: Node) -> Form | None:
    inside, mask, outside = node.args
    form = _one_by_one(reader, inside)
    if form is None or not isinstance(outside, (int, float)) or outside:
        return None
    return _times(reader, form, mask, inside, "unless") if are_alike(node, inside) else None


def _summands(reader: Reader, x: Any) -> Form | None:
    form = reader.form(x)
    return form if form is not None and set(form.terms) == {"each"} else None


def _one_by_one(reader: Reader, x: Any) -> Form | None:
    """Summands, or a matrix with zeros at all classes but one: of which the sum is taken too."""
    form = reader.form(x)
    return form if form is not None and form.is_picked else _summands(reader, x)


def _times(reader: Reader, form: Form, other: Any, of: Any, kind: Any) -> Form | None:
    while isinstance(other, Node) and other.target is aten.expand.default:
        other = other.args[0]
    found = reader.factor(other, of, kind)
    if found is None or form.dim is None:
        return None
    number, factors = found
    if any(factor.shape is not None for factor in factors):
        value, whole = view.tensors(other)[0], view.tensors(of)[0]
        place = form.dim - (whole.dim() - value.dim())
        if place >= 0 and not equal(value.shape[place], 1):
            return None
        shape = [1 if d == form.dim else size for d, size in enumerate(whole.shape)]
        factors = tuple(replace(factor, shape=tuple(shape)) for factor in factors)
    return form.times(number, *factors)


def _negated(reader: Reader, node: Node) -> Form | None:
    form = _summands(reader, node.args[0])
    return form.times(-1.0) if form is not None else None


def _summed(reader: Reader, node: Node) -> Form | None:
    read: Any = node.args[0]
    form = _summands(reader, read)
    if form is None or form.dim is None or not is_wide(node):
        return None
    means, rank = node.target in (aten.mean.default, aten.mean.dim), view.tensors(read)[0].dim()
    dims: Any = node.args[1] if len(node.args) > 1 else None
    dims = {d % rank for d in dims or range(rank)}
    if dims == {form.dim}:
        return _total(form, read, means=means, rows=False)
    return _total(form, read, means=means) if len(dims) == rank else None


def _total(each: Form, matrix: Node, *, means: bool, rows: bool = True) -> Form | None:
    """The sum of summands over the classes, and over the ``rows``; or their mean."""
    found = Form({"divergence": each.terms["each"]})
    if means:
        assert each.dim is not None
        classes: Any = view.tensors(matrix)[0].shape[each.dim]
        if classes == 0:
            return None
        factors = (Factor("rows"),) if rows else ()
        if isinstance(classes, int):
            found = found.times(1 / classes, *factors)
        else:
            found = found.times(1.0, Factor("columns"), *factors)
    return replace(found, reduced=rows)


RULES: dict[Any, tuple[Rule, ...]] = {
    aten.softmax.int: (_softmax,),
    aten.exp.default: (_exponential,),
    aten.kl_div.default: (_kl_div,),
    aten.cross_entropy_loss.default: (_soft_targets,),
    aten.mul.Tensor: (_met, _shared("times")),
    aten.mul.Scalar: (_shared("times"),),
    aten.div.Tensor: (_shared("over"),),
    aten.div.Scalar: (_shared("over"),),
    aten.masked_fill.Scalar: (_masked,),
    aten.sub.Tensor: (_difference,),
    aten.neg.default: (_negated,),
    **dict.fromkeys(
        (aten.sum.default, aten.mean.default, aten.sum.dim_IntList, aten.mean.dim), (_summed,)
    ),
}
