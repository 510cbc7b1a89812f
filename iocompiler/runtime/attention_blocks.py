"""The tables of blocks the attention templates visit: proved on the host where a mask reads no
tensor, and kept; else asked on the device, without reading anything back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iocompiler.runtime.attention_launch import launch
from iocompiler.tile.score import ScoreProgram
from iocompiler.tile.score_blocks import Grid, Table, classify, table


def blocks(
    program: ScoreProgram,
    keep: Any,
    grid: Grid,
    operands: Sequence[Tensor],
    numbers: tuple[int, ...],
    device: torch.device,
    *,
    transposed: bool,
) -> Table:
    """The table of a program's mask; ``keep`` is its Triton function."""
    if not program.loads(program.keep):
        return _proved(program, grid, numbers, transposed, device)
    found = classes(program, keep, grid, operands, numbers, device)
    batch, heads, down, across = found.shape
    down_stride, across_stride = found.stride()[2:]
    length, block = grid.columns, grid.n
    if transposed:
        down, across, down_stride, across_stride = across, down, across_stride, down_stride
        length, block = grid.rows, grid.m
    made = torch.empty((batch, heads, down, 2 + 2 * across), dtype=torch.int32, device=device)
    kernels = _kernels()
    launch(
        kernels.list_blocks,
        batch * heads * down,
        Classes=found,
        Table=made,
        class_strides=(found.stride(1), down_stride, across_stride),
        rows=down,
        count=across,
        room=across,
        short=int(length % block != 0),
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
    N].
    """
    if not program.loads(program.keep):
        some, every = classify(program, grid, operands, numbers)
        return (some.to(torch.int8) + every).contiguous().to(device)
    own_batch, own_heads = own(program, grid)
    found = torch.empty((own_batch, own_heads, *grid.counts), dtype=torch.int8, device=device)
    launch(
        _kernels().classify_blocks,
        found.numel(),
        Classes=found,
        operands=tuple(operands),
        strides=tuple(s for x in operands for s in x.stride()),
        numbers=numbers,
        own_heads=own_heads,
        rows=grid.rows,
        columns=grid.columns,
        keep=keep,
        BLOCK_M=grid.m,
        BLOCK_N=grid.n,
        num_warps=4,
    )
    return found


def own(program: ScoreProgram, grid: Grid) -> tuple[int, int]:
    """Of how many batches and heads the mask differs."""
    names = {program.ops[value].fn for value in program.behind(program.keep)}
    return grid.batch if "b" in names else 1, grid.heads if "h" in names else 1


@functools.lru_cache(maxsize=256)
def _proved(
    program: ScoreProgram,
    grid: Grid,
    numbers: tuple[int, ...],
    transposed: bool,
    device: torch.device,
) -> Table:
    """The table of a mask that reads no tensor: made on the host, once for each size."""
    made = table(program, grid, (), numbers, transposed=transposed)
    return Table(made.entries.to(device), made.ranges, made.room)


def _kernels() -> Any:
    # not before a template runs: it imports Triton
    from iocompiler.codegen.kernels import attention_blocks

    return attention_blocks
