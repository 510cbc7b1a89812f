"""`iocompiler::scored_attention_backward_summed` and `.._packed_summed`: the gradients of an
attention's query, key and value, and beside them their sums over lines of rows (`ColumnSums`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from iocompiler.ops import library
from iocompiler.ops.column_sums import ColumnSums, lines
from iocompiler.ops.packed_gradients import Layout, Packing, Shape
from iocompiler.ops.scored_call import GIVEN, SAVED, parted

SUMMED = library.define(
    f"scored_attention_backward_summed({SAVED}, {GIVEN}, int rows) -> (Tensor dquery, Tensor dkey, "
    "Tensor dvalue, Tensor sums_query, Tensor sums_key, Tensor sums_value)"
)
"""The sums are [B, H, lines, D], float32."""
PACKED_SUMMED = library.define(
    f"scored_attention_backward_packed_summed({SAVED}, {GIVEN}, str packing, int rows) -> "
    "(Tensor gradients, Tensor sums)"
)
"""The sums lie as the gradients do, with lines in place of rows."""


def _summed(*given: Any) -> tuple[Tensor, ...]:
    saved, call = parted(given[:-1])
    found = _summed_fake(*given)
    call.differentiate(saved, found[:3], ColumnSums(found[3:], given[-1]))
    return found


def _summed_fake(*given: Any) -> tuple[Tensor, ...]:
    _, call = parted(given[:-1])
    return (*call.gradients(), *(_lines(x, given[-1]) for x in call.inputs))


def _lines(x: Tensor, rows: int) -> Tensor:
    """Memory for the sums of one gradient: those of all heads side by side."""
    batch, heads, count, width = lines(x.shape, rows)
    made = x.new_empty((batch, count, heads, width), dtype=torch.float32)
    return made.transpose(1, 2)


def _packed_summed(*given: Any) -> tuple[Tensor, Tensor]:
    *of_call, text, rows = given
    saved, call = parted(of_call)
    layout, of_sums = _layouts(Packing.parsed(text), call.shapes, rows)
    packed = call.query.new_empty(layout.shape)
    sums = call.query.new_empty(of_sums.shape, dtype=torch.float32)
    call.differentiate(saved, layout.slices(packed), ColumnSums(of_sums.slices(sums), rows))
    return packed, sums


@functools.lru_cache(maxsize=512)
def _layouts(packing: Packing, shapes: tuple[Shape, ...], rows: int) -> tuple[Layout, Layout]:
    """Of the gradients and of their sums."""
    return packing.layout(shapes), packing.layout(tuple(lines(x, rows) for x in shapes))


def _packed_summed_fake(*given: Any) -> tuple[Tensor, Tensor]:
    *of_call, text, rows = given
    (_, call), packing = parted(of_call), Packing.parsed(text)
    make, shape = call.query.new_empty, packing.shape([lines(x, rows) for x in call.shapes])
    return make(packing.shape(call.shapes)), make(shape, dtype=torch.float32)


library.implement(
    "scored_attention_backward_summed", _summed, _summed_fake, launches=True, replays=True
)
library.implement(
    "scored_attention_backward_packed_summed",
    _packed_summed,
    _packed_summed_fake,
    launches=True,
    replays=True,
)
