"""`iocompiler::scored_attention_backward_summed` and `.._packed_summed`: the gradients of an
attention's query, key and value, and beside them their sums over lines of rows (`ColumnSums`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iocompiler.ops import library
from iocompiler.ops.column_sums import ColumnSums, Lines
from iocompiler.ops.packed_gradients import Packing
from iocompiler.ops.scored_attention import GIVEN, SAVED, parted

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
    batch, heads, count, width = Lines.of(x, rows).shape
    made = x.new_empty((batch, count, heads, width), dtype=torch.float32)
    return made.transpose(1, 2)


def _packed_summed(*given: Any) -> tuple[Tensor, Tensor]:
    (saved, call), packing, rows = _read(given)
    packed, sums = _packed_summed_fake(*given)
    parts = packing.slices(sums, [Lines.of(x, rows) for x in call.inputs])
    call.differentiate(saved, packing.slices(packed, call.inputs), ColumnSums(parts, rows))
    return packed, sums


def _packed_summed_fake(*given: Any) -> tuple[Tensor, Tensor]:
    (_, call), packing, rows = _read(given)
    make = call.query.new_empty
    shape = packing.shape([Lines.of(x, rows) for x in call.inputs])
    return make(packing.shape(call.inputs)), make(shape, dtype=torch.float32)


def _read(given: Sequence[Any]) -> tuple[Any, Packing, int]:
    return parted(given[:-2]), Packing.parsed(given[-2]), given[-1]


library.implement("scored_attention_backward_summed", _summed, _summed_fake, launches=True)
library.implement(
    "scored_attention_backward_packed_summed", _packed_summed, _packed_summed_fake, launches=True
)
