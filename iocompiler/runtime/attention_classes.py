"""Which blocks of the scores a mask leaves: proved on the host where it reads no tensor; else asked
on the device, score by score.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iocompiler.runtime.attention_form import Like, functions
from iocompiler.runtime.template_launch import Launch, members
from iocompiler.tile.score import ScoreProgram
from iocompiler.tile.score_blocks import Grid, classes_shape, classify
from iocompiler.tile.score_tables import Table, extents, without_loads

_COUNT = 8
"""Blocks one program classifies: what it reads of their rows is read once."""
_SCORES = 2048
"""A warp looks at so many scores at a time: with more, registers spill."""


@dataclass(frozen=True, eq=False)
class Mask:
    """A program whose mask reads tensors, but for their memory, over a grid of blocks."""

    program: ScoreProgram
    operands: tuple[Like, ...]
    numbers: tuple[int, ...]
    grid: Grid
    device: torch.device

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the classes: one batch or head where the mask is the same for all."""
        return classes_shape(self.program, self.grid)

    @functools.cached_property
    def reach(self) -> Table:
        """What the part of the mask that reads no tensor leaves of each row."""
        found = extents(without_loads(self.program), self.grid, self.numbers)
        return Table(found.to(self.device), True, 2)

    @functools.cached_property
    def launch(self) -> Launch:
        """What asks."""
        from iocompiler.codegen.kernels.attention_blocks import classify_blocks

        grid = self.grid
        return Launch(
            classify_blocks,
            ("Classes", "Reach", *members("operands", len(self.operands))),
            reach_strides=self.reach.strides,
            strides=tuple(s for x in self.operands for s in x.stride),
            numbers=self.numbers,
            own_heads=self.shape[1],
            rows=grid.rows,
            columns=grid.columns,
            keep=functions(self.program, tuple(len(x.shape) for x in self.operands)).keep,
            BLOCK_M=grid.m,
            BLOCK_N=grid.n,
            COUNT=_COUNT,
            num_warps=max(1, min(8, grid.m * grid.n // _SCORES)),
        )

    def classes(self, operands: Sequence[Tensor]) -> Tensor:
        """0, 1 or 2 for each block of scores that is empty, partial or full, int8, contiguous."""
        batch, heads, down, across = self.shape
        found = operands[0].new_empty(self.shape, dtype=torch.int8)
        if found.numel():
            self.launch.run(
                batch * heads * down * -(-across // _COUNT),
                *(found, self.reach.entries, *operands),
            )
        return found


def mask(
    program: ScoreProgram, operands: Sequence[Tensor], numbers: Sequence[int], grid: Grid
) -> Mask:
    """The mask of a program, found again where there was one like it."""
    likes = tuple(Like.of(x) for x in operands)
    return _found(program, likes, tuple(numbers), grid, operands[0].device)


_found = functools.lru_cache(maxsize=1024)(Mask)


def proved_classes(
    program: ScoreProgram, grid: Grid, numbers: tuple[int, ...], device: torch.device
) -> Tensor:
    """Those of a mask that reads no tensor."""
    some, every = classify(program, grid, (), numbers)
    return (some.to(torch.int8) + every).contiguous().to(device)
