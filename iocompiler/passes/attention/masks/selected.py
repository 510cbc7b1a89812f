"""Masks written as arithmetic: scores times what is 1 where a key stays and 0 elsewhere, plus a
number that hides where it is 0. ::

    scores * keep + -1e4 * (1 - keep)  -->  where(keep, scores, -1e4)

Exact for finite scores. An infinite one times 0 would be NaN, in every row that its key is hidden
from; as under a mask that is added, what is hidden counts as nothing, whatever it was.
"""

from __future__ import annotations

import math
from dataclasses import replace

from iocompiler.graph.patterns import HIDES
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import extents, indices
from iocompiler.passes.attention.masks.arithmetic import plain
from iocompiler.passes.attention.masks.evaluate import Evaluator
from iocompiler.passes.attention.masks.values import Bounds, Formula, Number, Select, Value, negate
from iocompiler.passes.attention.reading.constants import literal
from iocompiler.passes.attention.reading.description import Attention, Bias, Cast, Fill, Scale, Step


def selected(found: Attention, evaluator: Evaluator) -> Attention:
    """The attention with each such product and sum as the one mask that they are."""
    bounds = extents((*found.rows, found.column))
    steps: list[Step] = []
    for step in found.steps:
        place = _product_before(steps) if isinstance(step, Bias) else None
        if place is not None:
            product = steps[place]
            assert isinstance(product, Scale)
            assert isinstance(step, Bias)
            value = _hides(product, step, evaluator, bounds)
            if value is not None:
                del steps[place]
                steps.append(Fill(product.factor, product.dims, value, keep=True))
                continue
        steps.append(step)
    return replace(found, steps=tuple(steps))


def _product_before(steps: list[Step]) -> int | None:
    """The place of the last product with a tensor, if nothing else than what leaves 0 as it is
    stands behind it.
    """
    for place in reversed(range(len(steps))):
        step = steps[place]
        if isinstance(step, Scale) and step.dims:
            return place if views.is_tensor(step.factor) else None
        if isinstance(step, Scale):
            factor = literal(step.factor)
            if factor is None or not math.isfinite(factor):
                return None
        elif not isinstance(step, Cast):
            return None
    return None


def _hides(product: Scale, bias: Bias, evaluator: Evaluator, bounds: Bounds) -> float | None:
    """What the scores are where the product with ``product`` leaves nothing of them; None where the
    two are no mask.
    """
    keep = _kept(plain(evaluator.element(product.factor, indices(product.dims), bounds)), bounds)
    added = evaluator.element(bias.node, indices(bias.dims), bounds)
    if keep is None or not isinstance(added, Select):
        return None
    there, elsewhere = added.then, added.other
    if added.condition == negate(keep, bounds):
        there, elsewhere = elsewhere, there
    elif added.condition != keep:
        return None
    if there != Number(0.0) or not isinstance(elsewhere, Number):
        return None
    value = elsewhere.value * bias.factor
    return value if -math.inf < value <= HIDES else None


def _kept(value: Value, bounds: Bounds) -> Formula | None:
    """Where a number that is 0 or 1 is 1."""
    if not isinstance(value, Select):
        return None
    if (value.then, value.other) == (Number(1.0), Number(0.0)):
        return value.condition
    if (value.then, value.other) == (Number(0.0), Number(1.0)):
        return negate(value.condition, bounds)
    return None
