"""Which operator runs an attention: the library's kernels, or our template with a score program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from iocompiler.graph import view
from iocompiler.ops import target
from iocompiler.ops.scored_attention import WIDEST
from iocompiler.passes.attention.masks.evaluate import Evaluator
from iocompiler.passes.attention.masks.selected import selected
from iocompiler.passes.attention.reading.description import Attention, Causal, Declined, Scale
from iocompiler.passes.attention.running import decode, forward, scored
from iocompiler.passes.attention.running.scored import ScoredCall

_DROPPED_WIDTH = 64


def planned(found: Attention, evaluator: Evaluator) -> forward.Call | ScoredCall:
    """The library's call, or a score program where there is none or it is dearer.

    Raises:
        Declined: neither runs it.
    """
    call: forward.Call | None = None
    declined: Declined | None = None
    found = selected(found, evaluator)
    try:
        call = forward.plan(found, evaluator)
    except Declined as reason:
        declined = reason
    if found.reads_rows or wanted(call, found):
        try:
            return scored.plan(_proved(found, call), evaluator)
        except Declined as reason:
            if found.reads_rows:
                raise
            declined = declined and Declined(f"{declined}; {reason}")
    if call is None:
        assert declined is not None
        raise declined
    return call


def wanted(call: forward.Call | None, found: Attention) -> bool:
    """Whether a program is better than ``call``, the libraries' way: where that is none, and on a
    GPU where it needs a matrix of biases, where few queries meet many keys, or with dropout.
    """
    if call is None:
        return True
    if target.device_type(view.value(found.query.node)) != "cuda":
        return False
    if not (call.masking.masks or call.masking.terms):
        return decode.is_better(call) or _drops_faster(found)
    narrow = all(isinstance(each, int) and each <= WIDEST for each in _widths(found))
    return narrow and found.dtype != torch.float64


def _proved(found: Attention, call: forward.Call | None) -> Attention:
    """An attention for which a library needs no tensor added to the scores as causal or not, which
    was proved of masks that may be written in another way (of positions, of documents of which
    there is one): a program need not read them. Any other as it is written.
    """
    if call is None or call.masking.masks or call.masking.terms:
        return found
    structure = (Causal(),) if call.masking.causal else ()
    return replace(found, steps=(Scale(call.scale), *call.factors, *structure))


def _drops_faster(found: Attention) -> bool:
    """Whether our dropout, of fewer random words than the libraries draw, makes up for slower
    products: of heads 64 wide, forward and backward, whatever the length (measured on Hopper,
    benchmarks/RESULTS.md); heads of 128 lose up to 26 % of a training step.
    """
    if not 0.0 < found.dropout_p < 1.0 or found.dtype not in (torch.float16, torch.bfloat16):
        return False
    like = view.value(found.query.node)
    return target.capability(like) >= target.HOPPER and set(_widths(found)) == {_DROPPED_WIDTH}


def _widths(found: Attention) -> tuple[Any, Any]:
    return found.width.size, found.value_width.size
