"""The tables of blocks the attention templates visit: proved on the host where a mask reads no
tensor, and kept; else listed on the device by the classes of blocks, without reading anything back.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from iocompiler.cost_model.attention_tiles import Tile
from iocompiler.runtime.attention_form import Form
from iocompiler.runtime.template_launch import Launch
from iocompiler.tile.score import ScoreProgram
from iocompiler.tile.score_blocks import Grid
from iocompiler.tile.score_tables import Table, table

_ORDERED = 64
"""Rows one program finds a place for."""


def proved(form: Form, tile: Tile, *, transposed: bool) -> Table:
    """The table of a mask that reads no tensor: made on the host, once for each size."""

    def find() -> Table:
        grid = form.grid(tile.m, tile.n)
        return _proved(form.program, grid, form.numbers, form.device, transposed=transposed)

    return form.once(("table", tile.m, tile.n, transposed), find)


@functools.lru_cache(maxsize=256)
def _proved(
    program: ScoreProgram,
    grid: Grid,
    numbers: tuple[int, ...],
    device: torch.device,
    *,
    transposed: bool,
) -> Table:
    made = table(program, grid, (), numbers, transposed=transposed)
    return replace(made, entries=made.entries.to(device))


def visited(found: Table) -> dict[str, Any]:
    """A table as the templates take it, but for its entries."""
    return {"table_strides": found.strides, "room": found.room, "RANGES": found.ranges}


def listed(form: Form, kinds: Tensor, tile: Tile, *, transposed: bool) -> Table:
    """The table of a mask whose classes are known.

    Args:
        kinds: of the blocks of the form's grain, as `classes` gives them.
        tile: made of whole blocks of the grain.
    """
    batch, heads = kinds.shape[:2]
    grid = form.grid(tile.m, tile.n)
    down, across = reversed(grid.counts) if transposed else grid.counts
    made = kinds.new_empty((batch, heads, down, 3 + 2 * across), dtype=torch.int32)
    lists, order = form.once(
        ("list", tile.m, tile.n, transposed),
        lambda: (
            _list_launch(form.grain, grid, kinds, transposed=transposed),
            Launch(_kernels().order_rows, rows=down, room=across, BLOCK=_ORDERED),
        ),
    )
    lists.run(batch * heads * down, Classes=kinds, Table=made)
    order.run(batch * heads * -(-down // _ORDERED), Table=made)
    return Table(made, False, across)


def _list_launch(grain: Grid, grid: Grid, kinds: Tensor, *, transposed: bool) -> Launch:
    sizes, strides = kinds.shape[2:], kinds.stride()[2:]
    counts, folds = grid.counts, (grid.m // grain.m, grid.n // grain.n)
    length, block = grid.columns, grid.n
    if transposed:
        sizes, strides, counts, folds = sizes[::-1], strides[::-1], counts[::-1], folds[::-1]
        length, block = grid.rows, grid.m
    down, across = counts
    return Launch(
        _kernels().list_blocks,
        class_strides=(kinds.stride(1), *strides),
        class_rows=sizes[0],
        class_columns=sizes[1],
        rows=down,
        count=across,
        room=across,
        short=int(length % block != 0),
        DOWN=folds[0],
        ACROSS=folds[1],
        BLOCK=max(16, 1 << (across - 1).bit_length()),
        num_warps=1,
    )


def _kernels() -> Any:
    # not before a template runs: it imports Triton
    from iocompiler.codegen.kernels import attention_blocks

    return attention_blocks
