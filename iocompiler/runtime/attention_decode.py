"""Launching the template for few queries over many keys."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from iocompiler.cost_model.attention_decode import MOST_QUERIES, Decode, parts, tile
from iocompiler.cost_model.attention_tiles import Tile
from iocompiler.ops.target import Capability
from iocompiler.runtime.attention_form import Form, device_row
from iocompiler.runtime.template_launch import Launch, tile_arguments

_COLUMNS = 128
"""Lengths are priced in steps of this: a cache that grows by one key asks seldom."""
_PARTS_AT_ONCE = 16
_SHARED = (
    *("v_strides", "out_strides", "rows", "columns"),
    *("GROUP", "E", "BLOCK_E", "KEPT", "EMPTY", "PLANES"),
)
"""The arguments of the first kernel that the second takes too, tensors aside."""


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


def split_forward(
    form: Form, tensors: tuple[Tensor, ...], out: Tensor, lse: Tensor, rest: Tensor
) -> None:
    """The forward with the keys of each head in parts.

    Args:
        tensors: those that all templates take.
        out, lse, rest: what `attention.forward` writes.
    """
    strides = out.stride()
    found = form.once(("decode", strides), _decoding, form, strides)
    acc = out.new_empty(found.room, dtype=torch.float32)
    found.split.run(found.programs, *tensors, out, lse, rest, acc)
    if found.room:
        found.combine.run(found.queries, acc, tensors[2], out, lse, rest)


class _Decoding(NamedTuple):
    """The launches of a form; ``room``: for what the first leaves to the second, 0 where it leaves
    nothing.
    """

    split: Launch
    programs: int
    combine: Launch
    queries: int
    room: int


def _decoding(form: Form, out: tuple[int, ...]) -> _Decoding:
    from iocompiler.codegen.kernels.attention_decode import attention_combine, attention_split

    chosen, count = split(form)
    batch, heads, rows, _ = form.query.shape
    groups, queries = form.key.shape[1], batch * heads * rows
    lines = queries * count if count > 1 else 0
    given = {
        "out_strides": out, "rows": rows, "columns": form.key.shape[2],
        "EMPTY": form.program.empty, "KEPT": form.functions.KEPT, **form.strides, **form.common,
    }  # fmt: skip
    partial = {"parts": count, "lines": lines}
    first = Launch(
        attention_split, (*form.tensors, "Out", "Lse", "Rest", "Acc"), groups=groups,
        **given, **partial, **tile_arguments(chosen),
    )  # fmt: skip
    second = Launch(
        attention_combine, ("Acc", "V", "Out", "Lse", "Rest"), heads=heads, BLOCK_N=chosen.n,
        BLOCK_P=_PARTS_AT_ONCE, num_warps=4, **{name: given[name] for name in _SHARED}, **partial,
    )  # fmt: skip
    tiles = -(-(heads // groups * rows) // chosen.m)
    room = lines * (form.value.shape[3] + 2)
    return _Decoding(first, batch * groups * tiles * count, second, queries, room)


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
