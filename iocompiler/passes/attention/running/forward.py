"""The execution of a recognised attention: by `iocompiler::attention_forward` where its kernels
express it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import view
from iocompiler.ops.attention import FORWARD
from iocompiler.ops.attention_choice import choose
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.arrange import Arranger
from iocompiler.passes.attention.dims.axes import flat
from iocompiler.passes.attention.masks import structure
from iocompiler.passes.attention.masks.evaluate import Evaluator
from iocompiler.passes.attention.masks.limits import DROWNS, MOST_NEGATIVE
from iocompiler.passes.attention.masks.structure import Mask, Masking
from iocompiler.passes.attention.reading.constants import literal
from iocompiler.passes.attention.reading.description import (
    Attention,
    Bias,
    Cast,
    Causal,
    Declined,
    Fill,
    Pointwise,
    Scale,
    Step,
)
from iocompiler.passes.attention.reading.frame import Frame, forward_views
from iocompiler.passes.attention.running import hidden_rows
from iocompiler.passes.attention.running.operands import (
    cast,
    check_dtypes,
    finish,
    multiplied,
    operands,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """One call of the semantic op, before its operands are brought to its layout."""

    found: Attention
    masking: Masking
    scale: float
    factors: tuple[Scale, ...]  # what the query is multiplied by
    written: tuple[Fill, ...]  # over whole rows, perhaps, where that is differentiated

    @property
    def variant(self) -> str:
        frame = Frame(self.found)
        names = (
            ("gqa", frame.heads != frame.groups),
            ("causal", self.masking.causal),
            ("mask", bool(self.masking.masks)),
            ("bias", bool(self.masking.terms)),
            ("dropout", self.found.dropout_p > 0.0),
        )
        return "+".join(name for name, there in names if there) or "full"


def plan(found: Attention, evaluator: Evaluator) -> Call:
    """How the attention is run.

    Raises:
        Declined: no kernel expresses it.
    """
    check_dtypes(found)
    scale, factors, steps = _folded(found.steps)
    if any(found.column in flat(factor.dims) for factor in factors):
        raise Declined("the scores are multiplied by a tensor that differs from key to key")
    found = replace(found, steps=steps)
    masking = structure.read(found, evaluator)
    for term in masking.terms:
        _precise(views.dtype(term.node), found.dtype)
    for mask in masking.masks:
        _check(mask, found, alone=masking.is_one_mask)
    hidden_rows.check(found, masking.masks)
    return Call(found, masking, scale, factors, hidden_rows.written(found, masking))


def _check(mask: Mask, found: Attention, *, alone: bool) -> None:
    """Raise `Declined` where a bias does not do what the mask does, in every row."""
    if isinstance(mask.step, Causal):
        raise Declined("a causal mask of a single query")
    if isinstance(mask.step, Bias) and not views.dtype(mask.step.node).is_floating_point:
        raise Declined("an integer mask is added to the scores")
    if not isinstance(mask.step, Fill) or not math.isfinite(mask.value):
        return
    if found.dtype == torch.float16:
        raise Declined("float16 has no bias for a row that may be masked altogether")
    if not alone and mask.value > DROWNS:
        raise Declined(f"several masks or biases, one of only {mask.value:g}, may hide a row")


def _precise(bias: torch.dtype, kernel: torch.dtype) -> None:
    if not bias.is_floating_point or torch.promote_types(bias, kernel) != kernel:
        raise Declined(
            f"a bias in {bias} would lose precision in the kernels, which take it in {kernel}"
        )


def _folded(steps: tuple[Step, ...]) -> tuple[float, tuple[Scale, ...], tuple[Step, ...]]:
    """The product of the scales that are numbers, those known only at run time, and the other
    steps, what was added or filled in before a scale multiplied by it.
    """
    scale, factors, rest = 1.0, list[Scale](), list[Step]()
    for step in reversed(steps):
        if isinstance(step, Pointwise):
            raise Declined(f"{step.target} on the scores: no library kernel applies it")
        if isinstance(step, Cast) and not step.dtype.is_floating_point:
            raise Declined(f"the scores are rounded to {step.dtype}")
        if isinstance(step, Scale):
            factor = None if step.dims else literal(step.factor)
            if factor is None:
                factors.append(step)
            else:
                scale *= factor
        elif not isinstance(step, Cast):
            if factors or (scale <= 0.0 and isinstance(step, Fill)):
                raise Declined("masked or biased scores are scaled by what is not known before")
            rest.append(_scaled(step, scale))
    return scale, tuple(factors), tuple(reversed(rest))


def _scaled(step: Step, scale: float) -> Step:
    if isinstance(step, Bias):
        return replace(step, factor=step.factor * scale)
    return replace(step, value=step.value * scale) if isinstance(step, Fill) else step


def apply(gm: GraphModule, call: Call) -> None:
    """Put the call where the attention's output was computed, and erase what it stands for."""
    found, frame = call.found, Frame(call.found)
    anchor, dims = forward_views(found)
    arranger = Arranger(gm, anchor, (found.query, found.key, found.value))
    query, key, value = operands(arranger, found, frame)
    query = multiplied(arranger, query, call.factors, frame, found.dtype)
    bias = _bias(arranger, call, frame)
    values = [view.value(each) if each is not None else None for each in (query, key, value, bias)]
    causal, dropout_p = call.masking.causal, found.dropout_p
    choice = choose(*values, causal=causal, dropout_p=dropout_p)  # type: ignore[arg-type]
    results = arranger.call(
        FORWARD,
        query,
        key,
        value,
        bias,
        call.scale,
        causal,
        dropout_p,
        choice.kernel,
        choice.layout,
    )
    out = arranger.call(operator.getitem, results, 0)
    if call.written:
        out = hidden_rows.as_means(arranger, call.written, value, out, frame)
    finish(gm, found, arranger, out, anchor, dims)


def _bias(arranger: Arranger, call: Call, frame: Frame) -> Node | None:
    """The sum of all masks and biases, in the kernels' dtype, broadcastable to [B, H, S, K]."""
    parts = [_term(arranger, call, term, frame) for term in call.masking.terms]
    alike: dict[float, list[Fill]] = {}
    for mask in call.masking.masks:
        if isinstance(mask.step, Fill):
            alike.setdefault(mask.value, []).append(mask.step)
        else:
            parts.append(_mask(arranger, call, mask, frame))
    parts += [_fill(arranger, call, value, fills, frame) for value, fills in alike.items()]
    return reduce(partial(arranger.call, aten.add.Tensor), parts) if parts else None


def _term(arranger: Arranger, call: Call, term: Bias, frame: Frame) -> Node:
    node = cast(arranger, term.node, call.found.dtype)
    if term.factor != 1.0:
        node = arranger.call(aten.mul.Tensor, node, term.factor)
    return arranger.arranged(node, term.dims, frame.scores, widen=False)


def _fill(
    arranger: Arranger, call: Call, value: float, fills: Sequence[Fill], frame: Frame
) -> Node:
    """What hides a place once, however many masks do."""
    # alone, it makes a row it hides altogether uniform, whatever the scores there were
    alone = math.isfinite(value) and call.masking.is_one_mask
    hides = hidden_rows.places(arranger, fills, frame)
    node = arranger.call(aten.where.Scalar, hides, MOST_NEGATIVE if alone else _limited(value), 0.0)
    return cast(arranger, node, call.found.dtype)


def _mask(arranger: Arranger, call: Call, mask: Mask, frame: Frame) -> Node:
    step = mask.step
    assert isinstance(step, Bias)
    node = step.node
    if step.factor != 1.0:
        node = arranger.call(aten.mul.Tensor, node, step.factor)
    if _limited(mask.value) != mask.value:
        node = arranger.call(aten.clamp_min.default, node, MOST_NEGATIVE)
    node = cast(arranger, node, call.found.dtype)
    return arranger.arranged(node, step.dims, frame.scores, widen=False)


def _limited(value: float) -> float:
    return max(value, MOST_NEGATIVE) if math.isfinite(value) else value
