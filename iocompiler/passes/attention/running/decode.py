"""Attention of few queries over many keys, as in decoding: our template or a library's kernel."""

from __future__ import annotations

from typing import Any

import torch

from iocompiler.cost_model.attention_decode import MOST_QUERIES, Decode, template_is_better
from iocompiler.graph import view
from iocompiler.ops import target
from iocompiler.ops.attention_choice import choose
from iocompiler.ops.scored_attention import WIDEST
from iocompiler.passes.attention.dims import axes
from iocompiler.passes.attention.reading.frame import Frame
from iocompiler.passes.attention.reading.results import is_differentiated
from iocompiler.passes.attention.running.forward import Call

_SHORTEST = 256  # below, launches are all there is to price
_GROWING = 4096  # what a length that changes is taken for, where it is shorter now


def is_better(call: Call) -> bool:
    """Whether the template is better than the library's kernel; only for few queries of static
    number, without a matrix of biases: where it is priced below it, or in training where that is
    FlashAttention, whose backward has a tile of queries for one (measured on an H100: 45 us and 179
    for 1024 heads of 197 keys, 52 MB).
    """
    priced = _priced(call)
    if priced is None:
        return False
    work, kernel = priced
    like = view.value(call.found.query.node)
    on_hopper = target.capability(like) >= target.HOPPER
    if kernel == "flash" and on_hopper and is_differentiated(call.found.anchor):
        return True
    return work.columns >= _SHORTEST and template_is_better(work, target.row(like), kernel)


def _priced(call: Call) -> tuple[Decode, str] | None:
    """What is computed, and by which kernel of the libraries."""
    found = call.found
    like = view.value(found.query.node)
    half = found.dtype in (torch.float16, torch.bfloat16)
    if target.device_type(like) != "cuda" or not half or found.dropout_p:
        return None
    frame = Frame(found)
    rows, width, value_width = (axes.size(frame.out[2]), *_widths(frame))
    if not all(isinstance(each, int) for each in (rows, width, value_width)):
        return None
    if rows > MOST_QUERIES or max(width, value_width) > WIDEST:
        return None
    columns = _length(axes.size(frame.key[2]))
    groups, heads = _hint(axes.size(frame.groups)), _hint(axes.size(frame.heads))
    if not groups:
        return None
    query, key, value = (
        like.new_empty([axes.size(group) for group in dims], dtype=found.dtype)
        for dims in (frame.query, frame.key, frame.value)
    )
    causal = call.masking.causal
    kernel = choose(query, key, value, None, causal=causal, dropout_p=0.0).kernel
    batch = _hint(axes.size(frame.batch))
    work = Decode(batch, groups, heads // groups, rows, columns, width, value_width, 2)
    return work, kernel


def _widths(frame: Frame) -> tuple[Any, Any]:
    return axes.size(frame.query[3]), axes.size(frame.value[3])


def _length(size: Any) -> int:
    return size if isinstance(size, int) else max(_hint(size), _GROWING)


def _hint(size: Any) -> int:
    """A size as it is in the call that is compiled for."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return _GROWING if hint is None else int(hint)
