"""The tables of blocks the attention templates visit: proved on the host where a mask reads no
tensor, and kept; else listed on the device by the classes of blocks, without reading anything back.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from iocompiler.cost_model.attention_tiles import Tile
from iocompiler.runtime.attention_form import Form
from iocompiler.runtime.template_launch import Launch
from iocompiler.tile.index import power_of_two
from iocompiler.tile.score import ScoreProgram
from iocompiler.tile.score_blocks import Grid
from iocompiler.tile.score_tables import Table, table, table_shape

_ORDERED = 64
"""Rows one program finds a place for."""


@dataclass(frozen=True, eq=False)
class Visits:
    """The blocks that the programs of a kernel visit.

    Attributes:
        arguments: the table of them as the templates take it, but for its entries.
        proved: its entries, of a mask that reads no tensor.
        lists: what finds them, of one that does.
    """

    arguments: dict[str, Any]
    proved: Tensor | None
    lists: Lists | None

    @property
    def listed(self) -> bool:
        """Whether rows have lists of blocks, not ranges of them."""
        return not self.arguments["RANGES"]


@dataclass(frozen=True, eq=False)
class Lists:
    """What lists, on the device, the blocks of a mask whose classes are known.

    Attributes:
        shape: of the table's entries: B or 1, H or 1, rows of blocks, their length.
        room: how many blocks a row has at most.
        list, order: the launches; the second puts long rows first.
    """

    shape: tuple[int, int, int, int]
    room: int
    list: Launch
    order: Launch

    def entries(self, classes: Tensor) -> Tensor:
        """The table's, int32.

        Args:
            classes: as `Problem.classes` gives them.
        """
        made = classes.new_empty(self.shape, dtype=torch.int32)
        batch, heads, down, _ = self.shape
        self.list.run(batch * heads * down, classes, made)
        self.order.run(batch * heads * -(-down // _ORDERED), made)
        return made


def visits(form: Form, tile: Tile, *, transposed: bool) -> Visits:
    """``transposed``: blocks of queries, which programs of keys visit."""
    if not form.reads:
        grid = form.grid(tile.m, tile.n)
        found = _proved(form.program, grid, form.numbers, form.device, transposed=transposed)
        return Visits(_arguments(found.strides, found.room, found.ranges), found.entries, None)
    sizes = (form.query.shape[2], form.key.shape[2])
    made = lists(
        form.classes_shape, sizes, form.row.grain, (tile.m, tile.n),
        transposed=transposed, device=form.device,
    )  # fmt: skip
    batch, heads, down, length = made.shape
    strides = (heads * down * length * (batch > 1), down * length * (heads > 1), length)
    return Visits(_arguments(strides, made.room, False), None, made)


def _arguments(strides: tuple[int, int, int], room: int, ranges: bool) -> dict[str, Any]:
    return {"table_strides": strides, "room": room, "RANGES": ranges}


@functools.lru_cache(maxsize=256)
def _proved(
    program: ScoreProgram,
    grid: Grid,
    numbers: tuple[int, ...],
    device: torch.device,
    *,
    transposed: bool,
) -> Table:
    """The table of a mask that reads no tensor: made on the host, once for each size."""
    made = table(program, grid, (), numbers, transposed=transposed)
    return replace(made, entries=made.entries.to(device))


@functools.lru_cache(maxsize=1024)
def lists(
    classes: tuple[int, int, int, int],
    scores: tuple[int, int],
    block: tuple[int, int],
    tile: tuple[int, int],
    *,
    transposed: bool,
    device: torch.device,
) -> Lists:
    """What lists the tiles of a mask.

    Args:
        classes: their shape; contiguous.
        scores: rows and columns.
        block: so many make a class; tiles are made of whole blocks.
        transposed: rows of the lists are of keys, and have blocks of queries.
        device: whose launches they are: one is of the device that it first runs on.
    """
    batch, heads, *sizes = classes
    strides, folds, length = [sizes[1], 1], [t // b for t, b in zip(tile, block, strict=True)], 1
    if transposed:
        sizes, strides, folds, length = sizes[::-1], strides[::-1], folds[::-1], 0
    shape = table_shape((batch, heads), scores, tile, transposed=transposed)
    down, across = shape[2], (shape[3] - 3) // 2
    listing = Launch(
        _kernels().list_blocks,
        ("Classes", "Table"),
        class_strides=(classes[2] * classes[3], *strides),
        class_rows=sizes[0],
        class_columns=sizes[1],
        rows=down,
        count=across,
        room=across,
        short=int(scores[length] % tile[length] != 0),
        DOWN=folds[0],
        ACROSS=folds[1],
        BLOCK=max(16, power_of_two(across)),
        num_warps=1,
    )
    order = Launch(_kernels().order_rows, ("Table",), rows=down, room=across, BLOCK=_ORDERED)
    return Lists(shape, across, listing, order)


def _kernels() -> Any:
    # not before a template runs: it imports Triton
    from iocompiler.codegen.kernels import attention_blocks

    return attention_blocks
