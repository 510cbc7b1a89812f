"""Launching the templates for the gradient of an embedding table."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from iocompiler.codegen.kernels.embedding_gradient import (
    embedding_fold,
    embedding_keys,
    embedding_order,
    embedding_sums,
)
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.embedding import CHUNK, Tiles, by_counting, tiles
from iocompiler.ops.target import Capability, planned
from iocompiler.runtime.attention_form import device_row
from iocompiler.runtime.template_launch import Launch

_KEYS = 1024  # of a program
# half of 8192 tokens are one row: 256 chunks
_CHUNKS_AT_ONCE = 64


class _Form(NamedTuple):
    """All of a gradient but its memory."""

    tokens: int
    rows: int
    width: int
    padding: int
    grad_stride: int
    added: bool
    grad_dtype: torch.dtype
    table_dtype: torch.dtype
    index_dtype: torch.dtype
    device: torch.device
    planned: Capability | None

    @property
    def gpu(self) -> Device:
        return device_row(self.device, self.planned)

    @property
    def tiles(self) -> Tiles:
        return tiles(self.tokens, self.width, self.grad_dtype, self.gpu)


class _Launches(NamedTuple):
    """``order`` or, where that is None, ``keys`` for a sort of the library's."""

    order: Launch | None
    keys: Launch
    sums: Launch
    fold: Launch
    tiles: Tiles


def accumulate(
    table: Tensor, grad: Tensor, indices: Tensor, padding_idx: int, *, added: bool
) -> None:
    """``table[indices[t]] (+)= grad[t]``: the sum for each row in float32, rounded once, the same
    bits each time. Rows that no index names stay as they are; nothing waits for the device.

    Args:
        table: [V, D] contiguous, V < 2^31; written.
        grad: [T, D], elements of a row side by side, T < 2^31.
        indices: [T] int32 or int64, contiguous. Those outside of 0 <= i < V add to nothing.
        padding_idx: an index that adds to nothing; negative: none.
        added: whether to what stands in the table, or in its place.
    """
    count, width = grad.shape
    if not grad.numel() or not table.numel():
        return
    form = _Form(
        count, table.shape[0], width, padding_idx, grad.stride(0) if count > 1 else width, added,
        grad.dtype, table.dtype, indices.dtype, grad.device, planned(),
    )  # fmt: skip
    found = _launches(form)
    order, keys = _ordered(found, indices)
    chunks = -(-count // CHUNK)
    programs = chunks * -(-width // found.tiles.columns)
    parts = grad.new_empty((chunks, 2, width) if chunks > 1 else (1,), dtype=torch.float32)
    if chunks > 1:
        found.fold.ready(keys, table, parts)  # a table is written by both or by none
    found.sums.run(programs, grad, order, keys, table, parts)
    if chunks > 1:
        found.fold.run(programs, keys, table, parts)


def _ordered(found: _Launches, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens by (key, place), and their keys in that order."""
    count = indices.shape[0]
    keys = indices.new_empty(count, dtype=torch.int32)
    if found.order is None:
        found.keys.run(-(-count // _KEYS), indices, keys)
        keys, order = torch.sort(keys, stable=True)
        return order, keys
    order = torch.empty_like(keys)
    found.order.run(-(-count // found.tiles.counted), indices, order, keys)
    return order, keys


@functools.lru_cache(maxsize=1024)
def _launches(form: _Form) -> _Launches:
    chosen = form.tiles
    keyed = {"count": form.tokens, "rows": form.rows, "padding": form.padding}
    summed = {
        "count": form.tokens,
        "rows": form.rows,
        "width": form.width,
        "ADDED": form.added,
        "CHUNK": CHUNK,
        "BLOCK": chosen.columns,
    }
    folded = ("keys", "table", "parts")
    order = None
    if by_counting(form.tokens, form.gpu):
        order = Launch(
            embedding_order, ("indices", "order", "keys"), **keyed, BLOCK_M=chosen.counted,
            BLOCK_N=chosen.others, AHEAD=chosen.ahead, num_warps=8,
        )  # fmt: skip
    return _Launches(
        order,
        Launch(embedding_keys, ("indices", "keys"), **keyed, BLOCK=_KEYS, num_warps=4),
        Launch(
            embedding_sums,
            ("grad", "order", *folded),
            **summed,
            grad_stride=form.grad_stride,
            num_warps=1,
        ),
        Launch(embedding_fold, folded, **summed, BLOCK_C=_CHUNKS_AT_ONCE, num_warps=8),
        chosen,
    )
