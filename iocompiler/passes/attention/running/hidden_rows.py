"""Rows that a number written over the scores hides altogether, where the libraries' kernels run the
attention. Differentiated, they are means of the values, through which nothing flows back to query,
key and biases:

    where(all hidden, mean(value), attention(query, key, value, bias))

The kernels add the number instead, by which their backward would reach the scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

from torch import ops
from torch.fx import Node

from iocompiler.passes.attention.dims.arrange import Arranger
from iocompiler.passes.attention.masks.structure import Mask, Masking
from iocompiler.passes.attention.reading.description import Attention, Bias, Declined, Fill
from iocompiler.passes.attention.reading.frame import Frame
from iocompiler.passes.attention.reading.results import is_differentiated

aten = ops.aten
_LOST = 2.0**-25  # of a number: added to it, nothing


def check(found: Attention, masks: tuple[Mask, ...]) -> None:
    """Raise `Declined` where the sum of the numbers of two masks hides a place otherwise than the
    number written last, which decides between the places of a row that is hidden altogether.
    """
    for n, later in enumerate(masks):
        if not _is_written(found, later):
            continue
        for earlier in masks[:n]:
            if _is_written(found, earlier) and earlier.value == later.value:
                continue  # one mask, see `places`
            if abs(earlier.value) > abs(later.value) * _LOST:
                raise Declined(f"masked scores become {later.value:g}, whatever masked them before")


def _is_written(found: Attention, mask: Mask) -> bool:
    """Whether a finite number is written over the scores, and not into what is added to them."""
    return any(mask.step is step for step in _fills(found)) and math.isfinite(mask.value)


def _fills(found: Attention) -> list[Fill]:
    return [step for step in found.steps if isinstance(step, Fill)]


def written(found: Attention, masking: Masking) -> tuple[Fill, ...]:
    """What may write one number over whole rows of a differentiated attention.

    Raises:
        Declined: such a row is no mean of the values.
    """
    if not any(_is_written(found, mask) for mask in masking.masks):
        return ()
    if not is_differentiated(found.anchor):
        return ()
    left = [mask.step for mask in masking.masks]
    fills = tuple(fill for fill in _fills(found) if fill in left)
    if masking.causal or len(fills) < len(left) or len({fill.value for fill in fills}) > 1:
        raise Declined("several masks, one of them written over the scores, may hide a row")
    last = [step for step in found.steps if isinstance(step, (Bias, Fill))][-1]
    if isinstance(last, Bias) and masking.terms:
        raise Declined("what is added to masked scores has a gradient where all are masked")
    if found.dropout_p:
        raise Declined("a row that a mask may hide altogether is no mean under dropout")
    return fills


def places(arranger: Arranger, fills: Sequence[Fill], frame: Frame) -> Node:
    """Where one of them writes, broadcastable to [B, H, S, K]."""
    parts = []
    for fill in fills:
        hides = fill.condition
        if fill.keep:
            hides = arranger.call(aten.logical_not.default, hides)
        parts.append(arranger.arranged(hides, fill.dims, frame.scores, widen=False))
    return reduce(lambda one, other: arranger.call(aten.logical_or.default, one, other), parts)


def as_means(
    arranger: Arranger, fills: Sequence[Fill], value: Node, out: Node, frame: Frame
) -> Node:
    """The output [B, H, S, E] with such rows as means of the values [B, G, K, E]."""
    hidden = arranger.call(aten.all.dim, places(arranger, fills, frame), -1, True)
    mean = arranger.call(aten.mean.dim, value, [2], True)
    if frame.heads != frame.groups:
        repeats = arranger.size(frame.heads[len(frame.groups) :])
        mean = arranger.call(aten.repeat_interleave.self_int, mean, repeats, 1)
    return arranger.call(aten.where.self, hidden, mean, out)
