"""The blocks that the attention templates visit, row by row of blocks, from what `score_blocks`
proves of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iocompiler.tile.score import ScoreProgram
from iocompiler.tile.score_blocks import Grid, classify
from iocompiler.tile.score_builder import ScoreBuilder


@dataclass(frozen=True)
class Table:
    """What a kernel visits, as ``codegen/kernels/attention_table.py`` reads it.

    Attributes:
        entries: int32 [B or 1, H or 1, rows of blocks, length].
        ranges: whether the blocks of a row lie together, so that four numbers say which.
        room: how many blocks a row has at most.
    """

    entries: Tensor
    ranges: bool
    room: int

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of batch, head and row; 0 where all share."""
        sizes, strides = self.entries.shape, self.entries.stride()
        return tuple(
            0 if n == 1 and d < 2 else s
            for d, (n, s) in enumerate(zip(sizes, strides, strict=True))
        )[:3]  # type: ignore[return-value]


def table(
    program: ScoreProgram,
    grid: Grid,
    operands: Sequence[Tensor],
    numbers: Sequence[int],
    *,
    transposed: bool = False,
) -> Table:
    """The blocks of keys that each block of queries visits; ``transposed``: of queries, that each
    block of keys visits. A block that reaches past the end of what is visited is never full.
    """
    some, every = classify(program, grid, operands, numbers)
    if transposed:
        some, every = some.transpose(2, 3), every.transpose(2, 3)
    length, block = (grid.rows, grid.m) if transposed else (grid.columns, grid.n)
    if length % block:
        every = every.clone()
        every[..., -1] = False
    partial = some & ~every
    if some.device.type == "cpu" and _contiguous(some, every):
        return Table(_as_ranges(some, every, partial), True, some.shape[3])
    return Table(_as_lists(every, partial), False, some.shape[3])


def table_shape(
    owners: Sequence[Any], sizes: Sequence[Any], tile: Sequence[int], *, transposed: bool
) -> tuple[Any, Any, Any, Any]:
    """Of the lists of `listed`: [B or 1, H or 1, rows of blocks, length]."""
    down, across = (-(-size // block) for size, block in zip(sizes, tile, strict=True))
    if transposed:
        down, across = across, down
    return (*owners, down, 3 + 2 * across)


def listed(
    classes: Tensor,
    sizes: Sequence[int],
    block: Sequence[int],
    tile: Sequence[int],
    *,
    transposed: bool,
) -> Tensor:
    """The table of blocks of ``tile`` scores, of ``sizes`` of them, as lists.

    Args:
        classes: 0, 1 or 2 for each ``block`` that is empty, partial or full, of which tiles are
            made: int8 [B or 1, H or 1, M, N].
    """
    least = most = classes
    for dim, (size, part, whole) in enumerate(zip(sizes, block, tile, strict=True), 2):
        place = torch.arange(-(-size // whole) * (whole // part), device=classes.device)
        places = place.clamp(max=classes.shape[dim] - 1).reshape(-(-size // whole), whole // part)
        least = torch.stack([least.index_select(dim, each) for each in places.unbind(1)]).amin(0)
        most = torch.stack([most.index_select(dim, each) for each in places.unbind(1)]).amax(0)
    every, some = least == 2, most > 0
    if transposed:
        every, some = every.mT, some.mT
    if sizes[not transposed] % tile[not transposed]:
        every = every.clone()
        every[..., -1] = False
    return _as_lists(every, some & ~every)


def without_loads(program: ScoreProgram) -> ScoreProgram:
    """The program with only that part of its mask that reads no tensor: it keeps more."""
    build = ScoreBuilder(list(program.ops))
    waiting, kept = [program.keep], build.const(True)
    while waiting:
        value = waiting.pop()
        if value is None:
            continue
        op = program.ops[value]
        if op.fn == "and":
            waiting += op.inputs
        elif not program.loads(value):
            kept = build.map("and", kept, value)
    return build.program(program.score, kept, program.empty)


def extents(program: ScoreProgram, grid: Grid, numbers: Sequence[int]) -> Tensor:
    """The first and the last block of each row of blocks in which something may be kept, of a mask
    that reads no tensor: int32 [B or 1, H or 1, M, 2]; -1 for the last where there is none.
    """
    some, _ = classify(program, grid, (), numbers)
    place = torch.arange(some.shape[3])
    last = torch.where(some, place, -1).amax(-1)
    return torch.stack([some.to(torch.int8).argmax(-1), last], -1).to(torch.int32)


def _contiguous(some: Tensor, every: Tensor) -> bool:
    """Whether in each row the blocks visited lie together, and the full ones among them too."""

    def together(flags: Tensor) -> bool:
        padded = torch.nn.functional.pad(flags.to(torch.int8), (1, 0))
        return bool(((padded.diff(dim=-1) > 0).sum(-1) <= 1).all())

    return together(some) and together(every)


def _as_ranges(some: Tensor, every: Tensor, partial: Tensor) -> Tensor:
    first = some.to(torch.int8).argmax(-1)
    full = every.sum(-1)
    place = torch.arange(some.shape[3])
    before = place < every.to(torch.int8).argmax(-1, keepdim=True)
    left = (partial & (before | (full == 0).unsqueeze(-1))).sum(-1)
    return torch.stack([first, left, full, partial.sum(-1) - left], -1).to(torch.int32)


def _as_lists(every: Tensor, partial: Tensor) -> Tensor:
    parts = [partial.sum(-1, keepdim=True), every.sum(-1, keepdim=True)]
    most_first = (parts[0] + parts[1]).flip(2).argsort(dim=2, descending=True, stable=True)
    for flags in (partial, every):
        parts.append(flags.to(torch.int8).argsort(stable=True, dim=-1, descending=True))
    parts.append(every.shape[2] - 1 - most_first)
    return torch.cat(parts, -1).to(torch.int32)
