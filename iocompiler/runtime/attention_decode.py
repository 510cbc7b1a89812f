"""Launching the template for few queries over many keys."""

from __future__ import annotations

import functools
from typing import Any

import torch

from iocompiler.cost_model.attention_decode import MOST_QUERIES, Decode, parts, tile
from iocompiler.cost_model.attention_tiles import Tile
from iocompiler.ops.target import Capability
from iocompiler.runtime.attention_form import Form, device_row
from iocompiler.runtime.template_launch import Launch, tile_arguments

_COLUMNS = 128
"""Lengths are priced in steps of this: a cache that grows by one key asks seldom."""
_PARTS_AT_ONCE = 16
_COMBINED = ("V", "Out", "Lse", "Rest")
"""The tensors of the first kernel that the second takes too."""
_SHARED = (
    *("v_strides", "out_strides", "rows", "columns"),
    *("GROUP", "E", "BLOCK_E", "KEPT", "EMPTY", "PLANES"),
)
"""Its other arguments that the second takes too."""


def few_queries(form: Form) -> bool:
    """Whether this template runs the forward of a problem."""
    return form.query.shape[2] <= MOST_QUERIES and form.tiles is None


def work(form: Form) -> Decode:
    """A problem as the cost model sees it."""
    return Decode(*_sizes(form, form.key.shape[2]))


def _sizes(form: Form, columns: int) -> tuple[int, ...]:
    batch, heads, rows, width = form.query.shape
    groups, wide = form.key.shape[1], form.value.shape[3]
    return batch, groups, heads // groups, rows, columns, width, wide, form.query.dtype.itemsize


def split_forward(form: Form, tensors: dict[str, Any]) -> None:
    """The forward with the keys of each head in parts.

    Args:
        tensors: what `attention.forward` gives to both templates.
    """
    batch, heads, rows, _ = form.query.shape
    groups = form.key.shape[1]
    queries = batch * heads * rows
    chosen, count = form.once("split", lambda: split(form))
    lines = queries * count if count > 1 else 0
    strides = tensors["Out"].stride()
    first, second = form.once(
        ("decode", strides), lambda: _launches(form, strides, chosen, count, lines)
    )
    acc = tensors["Q"].new_empty(lines * (form.value.shape[3] + 2), dtype=torch.float32)
    tiles = -(-(heads // groups * rows) // chosen.m)
    first.run(batch * groups * tiles * count, **tensors, Acc=acc)
    if count > 1:
        second.run(queries, **{name: tensors[name] for name in _COMBINED}, Acc=acc)


def _launches(
    form: Form, out: tuple[int, ...], chosen: Tile, count: int, lines: int
) -> tuple[Launch, Launch]:
    from iocompiler.codegen.kernels.attention_decode import attention_combine, attention_split

    given = {
        "out_strides": out, "rows": form.query.shape[2], "columns": form.key.shape[2],
        "EMPTY": form.program.empty, "KEPT": form.functions.KEPT, **form.strides, **form.common,
    }  # fmt: skip
    partial = {"parts": count, "lines": lines}
    first = Launch(
        attention_split, groups=form.key.shape[1], **given, **partial, **tile_arguments(chosen)
    )
    second = Launch(
        attention_combine, heads=form.query.shape[1], BLOCK_P=_PARTS_AT_ONCE, BLOCK_N=chosen.n,
        num_warps=4, **{name: given[name] for name in _SHARED}, **partial,
    )  # fmt: skip
    return first, second


def split(form: Form) -> tuple[Tile, int]:
    """The tile, and in how many parts the keys are read."""
    columns = form.key.shape[2]
    rounded = -(-columns // _COLUMNS) * _COLUMNS
    chosen, count = _split(_sizes(form, rounded), form.device, form.planned)
    return chosen, min(form.parts or count, -(-columns // chosen.n))


@functools.lru_cache(maxsize=4096)
def _split(
    sizes: tuple[int, ...], device: torch.device, planned: Capability | None
) -> tuple[Tile, int]:
    task = Decode(*sizes)
    return tile(task), parts(task, device_row(device, planned))
