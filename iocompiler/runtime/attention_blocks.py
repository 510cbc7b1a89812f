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
    if not _reads(program):
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
    if not _reads(program):
        some, every = classify(program, grid, operands, numbers)
        return (some.to(torch.int8) + every).contiguous().to(device)
    batched, by_head = _differs(program)
    own_batch, own_heads = grid.batch if batched else 1, grid.heads if by_head else 1
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
        num_warps=1,  # its sums stay within a warp
    )
    return found


@functools.lru_cache(maxsize=512)
def _reads(program: ScoreProgram) -> bool:
    """Whether the mask reads a tensor."""
    return bool(program.loads(program.keep))


@functools.lru_cache(maxsize=512)
def _differs(program: ScoreProgram) -> tuple[bool, bool]:
    """Whether the mask differs from batch to batch, and from head to head."""
    names = {program.ops[value].fn for value in program.behind(program.keep)}
    return "b" in names, "h" in names


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
