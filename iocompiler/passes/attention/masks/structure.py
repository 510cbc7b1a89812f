"""What the masks and biases of a score program come to: structure that is proved, and tensors that
are left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import sympy
import torch
from torch.fx import Node

from iocompiler.graph.patterns import HIDES
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import broadcast, extents, indices
from iocompiler.passes.attention.masks.arithmetic import compare
from iocompiler.passes.attention.masks.evaluate import Evaluator
from iocompiler.passes.attention.masks.limits import DROWNS
from iocompiler.passes.attention.masks.values import (
    FORMULAS,
    AtLeast,
    Bounds,
    Formula,
    Number,
    Opaque,
    Select,
    Value,
    conjuncts,
    magnitude,
    negate,
)
from iocompiler.passes.attention.reading.constants import constant
from iocompiler.passes.attention.reading.description import (
    Attention,
    Bias,
    Causal,
    Declined,
    Fill,
    Step,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Mask:
    """Where ``keeps`` does not hold the score becomes ``value``, or has it added; ``step`` is where
    it comes from.
    """

    keeps: Formula
    value: float
    step: Bias | Fill | Causal


@dataclass(frozen=True)
class Masking:
    """Causal or not, and what has to be added to the scores as tensors."""

    causal: bool
    masks: tuple[Mask, ...]
    terms: tuple[Bias, ...]

    @property
    def is_one_mask(self) -> bool:
        """Nothing but one mask is left, or several that write one number over the scores."""
        alike = all(isinstance(mask.step, Fill) for mask in self.masks) or len(self.masks) == 1
        return alike and len({mask.value for mask in self.masks}) == 1 and not self.terms


def read(found: Attention, evaluator: Evaluator) -> Masking:
    """The masks of an attention.

    A causal mask is taken as structure where that changes no row: where it sets scores to -inf, or
    where nothing else masks and the biases are known to be small beside it, so that every row keeps
    a key.

    Raises:
        Declined: a number written over scores does not mask them.
    """
    bounds = extents((*found.rows, found.column))
    masks: list[Mask] = []
    terms: list[Bias] = []
    size = 0.0
    for step in _parted(found.steps, evaluator):
        if isinstance(step, Causal):
            masks.append(Mask(_lower(found), -math.inf, step))
        elif isinstance(step, Fill):
            masks += _fill(step, evaluator, bounds)
        elif isinstance(step, Bias):
            value = evaluator.element(step.node, indices(step.dims), bounds)
            mask = _added(value, step, bounds)
            if mask is not None:
                masks += [mask] if mask.keeps is not True else []
            elif value != Number(0.0):
                terms.append(step)
                size += abs(step.factor) * magnitude(value)
    return _combined(found, masks, terms, size)


def _parted(steps: Iterable[Step], evaluator: Evaluator) -> Iterator[Step]:
    """The steps, a sum or a masked tensor that is added as the parts it is made of: each may be
    structure.
    """
    for step in steps:
        parts = _parts(step, evaluator) if isinstance(step, Bias) else None
        if parts is None:
            yield step
        else:
            yield from _parted(parts, evaluator)


def _parts(step: Bias, evaluator: Evaluator) -> list[Step] | None:
    """``a + b`` as two biases, ``where(keep, a, -1e9)`` as a bias and a mask; copies are seen
    through, unless they are written to.
    """
    node = step.node
    while node.target in views.COPIES and not evaluator.is_written(node):
        (node,) = node.all_input_nodes
    if evaluator.is_written(node):
        return None
    if node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
        tensors = [each for each in node.args if isinstance(each, Node)]
        dims = [broadcast(step.dims, views.shape(each)) for each in tensors if _is_float(each)]
        if len(dims) != 2:
            return None
        return [
            Bias(each, its, step.factor)
            for each, its in zip(tensors, dims, strict=True)
            if its is not None
        ]
    if (
        node.target not in (aten.where.ScalarOther, aten.where.self, aten.masked_fill.Scalar)
        or step.factor != 1.0
    ):
        return None
    keep = node.target is not aten.masked_fill.Scalar
    condition, source = (node.args[0], node.args[1]) if keep else (node.args[1], node.args[0])
    value = constant(node.args[2])
    if (
        not isinstance(condition, Node)
        or not isinstance(source, Node)
        or constant(source) is not None
    ):
        return None
    its, under = (broadcast(step.dims, views.shape(each)) for each in (source, condition))
    if value is None or value > DROWNS or not _is_float(source) or its is None or under is None:
        return None
    return [Bias(source, its), Fill(condition, under, value, keep)]


def _is_float(node: Node) -> bool:
    return views.is_tensor(node) and views.dtype(node).is_floating_point


def _combined(found: Attention, masks: list[Mask], terms: list[Bias], size: float) -> Masking:
    if not masks:
        return Masking(False, (), tuple(terms))
    lower = _lower(found)
    pure = [
        mask
        for mask in masks
        if conjuncts(mask.keeps) and all(c == lower for c in conjuncts(mask.keeps))
    ]
    rest = [mask for mask in masks if mask not in pure]
    exact = [mask for mask in pure if mask.value == -math.inf or not rest]
    if any(mask.value > -4.0 * size for mask in exact):
        exact = [mask for mask in exact if mask.value == -math.inf]
    if found.row is None:
        exact = []
    partly = any(lower in conjuncts(mask.keeps) and mask.value == -math.inf for mask in rest)
    left = [mask for mask in masks if mask not in exact]
    return Masking(bool(exact) or (partly and found.row is not None), tuple(left), tuple(terms))


def _lower(found: Attention) -> AtLeast:
    i = found.row.index if found.row is not None else sympy.Integer(0)
    return AtLeast(sympy.expand(i - found.column.index))


def _fill(step: Fill, evaluator: Evaluator, bounds: Bounds) -> list[Mask]:
    places = indices(step.dims)
    value = evaluator.element(step.condition, places, bounds)
    if not isinstance(value, FORMULAS):  # 1 and 0, see `selected`
        value = compare("ne", value, Number(0.0), bounds)
    formula = value if isinstance(value, FORMULAS) else Opaque((step.condition, places))
    keeps = formula if step.keep else negate(formula, bounds)
    if keeps is True:
        return []
    if not step.value <= HIDES:
        raise Declined(f"masked scores become {step.value:g}, which does not mask them")
    return [Mask(keeps, step.value, step)]


def _added(value: Value, step: Bias, bounds: Bounds) -> Mask | None:
    """The mask that adding this is: 0 where it keeps, a large negative number elsewhere."""
    if not isinstance(value, Select) or step.factor <= 0.0:
        return None
    then, other = value.then, value.other
    if not isinstance(then, Number) or not isinstance(other, Number):
        return None
    if then.value == 0.0 and other.value * step.factor <= HIDES:
        return Mask(value.condition, other.value * step.factor, step)
    if other.value == 0.0 and then.value * step.factor <= HIDES:
        return Mask(negate(value.condition, bounds), then.value * step.factor, step)
    return None
