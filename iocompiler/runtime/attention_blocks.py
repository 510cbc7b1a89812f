"""The tables of blocks the attention templates visit: proved on the host where a mask reads no
tensor, and kept; else asked on the device, without reading anything back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iocompiler.runtime.template_launch import launch
from iocompiler.tile.score import ScoreProgram
from iocompiler.tile.score_blocks import Grid, Table, classify, extents, table, without_loads

_COUNT = 8
"""Blocks one program classifies: what it reads of their rows is read once."""
_SCORES = 2048
"""A warp looks at so many scores at a time: with more, registers spill."""


@functools.lru_cache(maxsize=256)
def proved(
    program: ScoreProgram,
    grid: Grid,
    numbers: tuple[int, ...],
    device: torch.device,
    *,
    transposed: bool,
) -> Table:
    """The table of a mask that reads no tensor: made on the host, once for each size."""
    made = table(program, grid, (), numbers, transposed=transposed)
    return Table(made.entries.to(device), made.ranges, made.room)


def listed(kinds: Tensor, grain: Grid, grid: Grid, *, transposed: bool) -> Table:
    """The table of a mask whose classes are known.

    Args:
        kinds: of the blocks of ``grain``, as `classes` gives them.
        grid: the table's; its blocks are made of whole ones of ``grain``.
    """
    batch, heads = kinds.shape[:2]
    sizes, strides = kinds.shape[2:], kinds.stride()[2:]
    counts, folds = grid.counts, (grid.m // grain.m, grid.n // grain.n)
    length, block = grid.columns, grid.n
    if transposed:
        sizes, strides, counts, folds = sizes[::-1], strides[::-1], counts[::-1], folds[::-1]
        length, block = grid.rows, grid.m
    down, across = counts
    made = kinds.new_empty((batch, heads, down, 2 + 2 * across), dtype=torch.int32)
    launch(
        _kernels().list_blocks,
        batch * heads * down,
        Classes=kinds,
        Table=made,
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
    return Table(made, False, across)


def classes(
    program: ScoreProgram,
    keep: Any,
    grid: Grid,
    operands: Sequence[Tensor],
    numbers: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """0, 1 or 2 for each block of scores that is empty, partial or full, int8 [B or 1, H or 1, M,
    N]; ``keep`` is the Triton function of the program's mask.
    """
    if not reads(program):
        some, every = classify(program, grid, operands, numbers)
        return (some.to(torch.int8) + every).contiguous().to(device)
    batched, by_head = _differs(program)
    own_batch, own_heads = grid.batch if batched else 1, grid.heads if by_head else 1
    down, across = grid.counts
    found = torch.empty((own_batch, own_heads, down, across), dtype=torch.int8, device=device)
    reach = _reach(program, grid, numbers, device)
    launch(
        _kernels().classify_blocks,
        own_batch * own_heads * down * -(-across // _COUNT),
        Classes=found,
        Reach=reach.entries,
        reach_strides=reach.strides,
        operands=tuple(operands),
        strides=tuple(s for x in operands for s in x.stride()),
        numbers=numbers,
        own_heads=own_heads,
        rows=grid.rows,
        columns=grid.columns,
        keep=keep,
        BLOCK_M=grid.m,
        BLOCK_N=grid.n,
        COUNT=_COUNT,
        num_warps=max(1, min(8, grid.m * grid.n // _SCORES)),
    )
    return found


@functools.lru_cache(maxsize=512)
def reads(program: ScoreProgram) -> bool:
    """Whether the mask reads a tensor."""
    return bool(program.loads(program.keep))


@functools.lru_cache(maxsize=512)
def _differs(program: ScoreProgram) -> tuple[bool, bool]:
    """Whether the mask differs from batch to batch, and from head to head."""
    names = {program.ops[value].fn for value in program.behind(program.keep)}
    return "b" in names, "h" in names


@functools.lru_cache(maxsize=256)
def _reach(
    program: ScoreProgram, grid: Grid, numbers: tuple[int, ...], device: torch.device
) -> Table:
    """What the part of a mask that reads no tensor leaves of each row."""
    found = extents(without_loads(program), grid, numbers)
    return Table(found.to(device), True, 2)


def _kernels() -> Any:
    # not before a template runs: it imports Triton
    from iocompiler.codegen.kernels import attention_blocks

    return attention_blocks
