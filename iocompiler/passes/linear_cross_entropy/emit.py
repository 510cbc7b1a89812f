"""From a form to the operator: its rows' inputs, its coefficients, and what stays outside."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.graph.sizes import known
from iocompiler.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY, WITH_LOGITS
from iocompiler.ops.linear_divergence import LINEAR_DIVERGENCE
from iocompiler.passes.linear_cross_entropy.description import (
    NEVER,
    Comparison,
    Declined,
    Head,
    Labels,
)
from iocompiler.passes.linear_cross_entropy.forms import Factor, Form, Statistic, Term

aten = torch.ops.aten
_MEAN = Term(1.0, (Factor("kept"),))


@dataclass(frozen=True)
class Other:
    """What the logits are compared with, and how.

    Attributes:
        tensors: x [T, C], weight [V, C] and bias [V] or None; or [T, V], None and None.
        numbers: kind, outer, inner and capped of `ops.linear_divergence_rows.Divergence`.
    """

    comparison: Comparison
    tensors: tuple[Node, Node | None, Node | None]
    numbers: tuple[str, float, float, bool]


class Emitter:
    """Makes the operator's call before the node ``near``.

    Args:
        x: [T, D].
        head: with the parameters that the operator reads (`operands.parameters`).
        keeps: whether the logits are a result too.
        other: what they are compared with; None: nothing.
    """

    def __init__(
        self,
        gm: GraphModule,
        near: Node,
        x: Node,
        labels: Labels | None,
        head: Head,
        *,
        keeps: bool,
        other: Other | None = None,
    ) -> None:
        self._gm, self._near, self._x, self._head = gm, near, x, head
        self._keeps, self._logits, self._other = keeps, x, other
        value = view.tensors(x)[0]
        self._wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        self._given, self._target = head.x, None
        self._ignore, self._smoothing = NEVER, 0.0
        if labels is not None:
            self._given, self._smoothing = labels.target, labels.smoothing
            self._ignore = NEVER if labels.ignore_index is None else labels.ignore_index
            self._target = self._call(aten.reshape.default, labels.target, [-1])
            if labels.wrapped:
                self._target = self._wrapped(self._target)

    def loss(self, form: Form, *, by_rows: bool = False) -> Node:
        """What a form in normal form is, in the shape and dtype of the node it is made before.

        Args:
            by_rows: summed outside of the operator, which makes its gradients only when they are
                asked for.
        """
        new = self._value(form, by_rows=by_rows)
        wanted = view.tensors(self._near)[0]
        if tuple(map(str, view.tensors(new)[0].shape)) != tuple(map(str, wanted.shape)):
            sizes = [self._size(size, self._x) for size in wanted.shape]
            new = self._call(aten.reshape.default, new, sizes)
        if view.tensors(new)[0].dtype != wanted.dtype:
            new = self._call(aten.to.dtype, new, wanted.dtype)
        return new

    def logits(self) -> Node:
        """The logits of the operator that `loss` has made, in the head's shape."""
        found, wanted = self._logits, view.tensors(self._head.node)[0]
        if wanted.dim() != 2:
            sizes = [self._size(size, self._head.x) for size in wanted.shape[:-1]]
            sizes.append(self._size(wanted.shape[-1], self._head.weight))
            found = self._call(aten.reshape.default, found, sizes)
        if view.tensors(found)[0].dtype != wanted.dtype:  # its bias is wider
            found = self._call(aten.to.dtype, found, wanted.dtype)
        return found

    def _value(self, form: Form, *, by_rows: bool) -> Node:
        """The sum over rows, or each row's value [T].

        What a sum is multiplied by goes into it: its gradients, made in the forward, are then those
        of the whole, and a backward that begins with 1 has nothing left to do.
        """
        names: tuple[Statistic, ...] = ("cross", "square", "divergence")
        cross, square, divergence = (form.terms.get(name, ()) for name in names)
        if len(cross) == 1 and not (square or divergence):
            (term,) = cross
            if not form.reduced:
                return self._row_by_row(term)
            if term in (Term(), _MEAN) and not by_rows:
                reduction = "mean" if term == _MEAN else "sum"
                return self._operator(reduction=reduction)
        shares = [self._coefficient(terms) for terms in (cross, square, divergence)]
        if self._target is not None and not cross:
            shares[0] = self._call(aten.zeros_like.default, self._ones())
        at_once = form.reduced and not by_rows
        result = self._operator(*shares, reduction="sum" if at_once else "none")
        if form.reduced and by_rows:
            result = self._call(aten.sum.default, result)
        return self._or_nan(result, (*cross, *square, *divergence))

    def _row_by_row(self, term: Term) -> Node:
        """Rows have their gradients in the backward, be they multiplied before or behind."""
        inside = tuple(f for f in term.factors if self._is_of_rows(f) or f.kind == "classes")
        outside = [f for f in term.factors if f not in inside]
        coefficient = self._coefficient((Term(1.0, inside),)) if inside else None
        result = self._operator(coefficient, reduction="none")
        return self._times(result, term.number, outside)

    def _operator(
        self,
        coefficient: Node | None = None,
        squared: Node | None = None,
        share: Node | None = None,
        *,
        reduction: str,
    ) -> Node:
        head, other = self._head, self._other
        setting = (self._ignore, self._smoothing, head.outer, head.inner, head.capped)
        shares = (self._target, coefficient, squared)
        if other is not None:
            how = other.comparison
            compared = (how.scale, *other.numbers, how.entropy, how.reversed, how.spread)
            tensors = (self._x, head.weight, head.bias, *other.tensors, *shares, share)
            return self._call(LINEAR_DIVERGENCE, *tensors, *setting, *compared, reduction)
        inputs = (self._x, head.weight, head.bias, *shares)
        if not self._keeps:
            return self._call(LINEAR_CROSS_ENTROPY, *inputs, *setting, reduction)
        both = self._call(WITH_LOGITS, *inputs, *setting, reduction)
        self._logits = self._call(operator.getitem, both, 1)
        return self._call(operator.getitem, both, 0)

    @staticmethod
    def _is_of_rows(factor: Factor) -> bool:
        return factor.kind == "class" or factor.shape is not None

    def _or_nan(self, result: Node, cross: Sequence[Term]) -> Node:
        """A mean over no rows is NaN, whatever is added to it; so is nothing over zero."""
        factors = dict.fromkeys(f for term in cross for f in term.factors)
        for factor in (f for f in factors if self._may_divide_by_zero(f)):
            nothing = self._call(aten.new_zeros.default, result, [])
            result = self._call(aten.add.Tensor, result, self._by(nothing, factor))
        return result

    def _may_divide_by_zero(self, factor: Factor) -> bool:
        if factor.kind == "rows":
            return not known(view.tensors(self._x)[0].shape[0] > 0)
        return factor.kind in ("kept", "classes") or (factor.kind == "over" and not factor.shape)

    # --- coefficients

    def _coefficient(self, terms: Sequence[Term]) -> Node | None:
        """[T]: the sum of the terms; None for none."""
        total: Node | None = None
        for term in terms:
            of_rows = [f for f in term.factors if self._is_of_rows(f)]
            value = self._ones()
            for factor in (*of_rows, *(f for f in term.factors if f not in of_rows)):
                value = self._times(value, 1.0, (factor,))
            value = self._times(value, term.number, ())
            total = value if total is None else self._call(aten.add.Tensor, total, value)
        return total

    def _ones(self) -> Node:
        return self._call(aten.new_ones.default, self._x, [self._rows()], dtype=self._wide)

    def _rows(self) -> Any:
        """How many there are: a number, or a node where it is symbolic."""
        rows = view.tensors(self._x)[0].shape[0]
        return rows if isinstance(rows, int) else self._call(aten.sym_size.int, self._x, 0)

    def _times(self, value: Node, number: float, factors: Sequence[Factor]) -> Node:
        for factor in factors:
            value = self._by(value, factor)
        return value if number == 1.0 else self._call(aten.mul.Tensor, value, number)

    def _by(self, value: Node, factor: Factor) -> Node:
        if factor.kind == "rows":
            return self._call(aten.div.Tensor, value, self._rows())
        if factor.kind == "columns":
            return self._call(aten.div.Tensor, value, self._classes())
        if factor.kind == "kept":
            count = self._call(aten.sum.default, self._mask())
            return self._call(aten.div.Tensor, value, count)
        assert factor.node is not None
        if factor.kind in ("class", "classes"):
            weights = self._class_weights(factor.node)
            if factor.kind == "class":
                return self._call(aten.mul.Tensor, value, weights)
            return self._call(aten.div.Tensor, value, self._call(aten.sum.default, weights))
        other = self._flat(factor)
        if factor.kind in ("where", "unless"):
            if factor.kind == "unless":
                other = self._call(aten.logical_not.default, other)
            return self._call(aten.where.ScalarOther, other, value, 0.0)
        target = aten.mul.Tensor if factor.kind == "times" else aten.div.Tensor
        return self._call(target, value, other)

    def _mask(self) -> Node:
        return self._call(aten.ne.Scalar, self._target, self._ignore)

    def _class_weights(self, weights: Node) -> Node:
        """Of each row's target; 0 where it is ignored."""
        kept = self._mask()
        label = self._call(aten.where.ScalarOther, kept, self._target, 0)
        chosen = self._call(aten.index_select.default, weights, 0, label)
        chosen = self._call(aten.to.dtype, chosen, self._wide)
        return self._call(aten.where.ScalarOther, kept, chosen, 0.0)

    def _flat(self, factor: Factor) -> Node:
        """A factor in the rows' order [T], in their precision; a number as it is."""
        node = factor.node
        assert node is not None
        if factor.shape is None:
            return node
        value = view.tensors(node)[0]
        if value.dtype != torch.bool and value.dtype != self._wide:
            node = self._call(aten.to.dtype, node, self._wide)
        if tuple(map(str, value.shape)) != tuple(map(str, factor.shape)):
            node = self._call(
                aten.expand.default, node, [self._size(s, node) for s in factor.shape]
            )
        return self._call(aten.reshape.default, node, [-1])

    def _size(self, size: Any, node: Node) -> Any:
        """A number, or a node that computes it, where one of what is at hand has that size."""
        if isinstance(size, int):
            return size
        for source in (node, self._given):
            for dim, other in enumerate(view.tensors(source)[0].shape):
                if str(other) == str(size):
                    return self._call(aten.sym_size.int, source, dim)
        raise Declined("a mask that is repeated over rows whose number varies")

    def _wrapped(self, target: Node) -> Node:
        """Classes counted from the end, as indices are."""
        counted = self._call(aten.add.Tensor, target, self._classes())
        negative = self._call(aten.lt.Scalar, target, 0)
        return self._call(aten.where.self, negative, counted, target)

    def _classes(self) -> Any:
        """How many there are: a number, or a node where it is symbolic."""
        weight = self._head.weight
        classes: Any = view.tensors(weight)[0].shape[0]
        if isinstance(classes, int):
            return classes
        return self._call(aten.sym_size.int, weight, 0)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return edit.call(self._gm, target, args, kwargs, near=self._near)


def united(found: Sequence[Labels], base: Any) -> Labels:
    """The labels of all statistics of one head.

    Args:
        base: of a target, what it is a view of.

    Raises:
        Declined: there are several.
    """
    if not found:
        raise Declined("no target is picked")
    losses = [each for each in found if each.ignore_index is not None]
    first = (losses or found)[0]
    for each in found:
        if base(each.target) is not base(first.target) or each.wrapped != first.wrapped:
            raise Declined("the logits meet several targets")
    for each in losses:
        if replace(each, target=first.target) != first:
            raise Declined("the losses ignore or smooth differently")
    return first
