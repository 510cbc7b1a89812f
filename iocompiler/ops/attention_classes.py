"""`iocompiler::attention_classes`: which blocks of the scores a mask leaves that reads tensors; and
`.._table`: the lists of those that the programs of a kernel visit.

Each block is 0 where nothing is kept, 1 where something is, 2 where all is. They are operators of
their own so that attentions with one mask, the layers of a model and their backwards, ask once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iocompiler.ops import library
from iocompiler.ops.attempt import template_or
from iocompiler.tile.score import parsed
from iocompiler.tile.score_blocks import Grid, classes_shape
from iocompiler.tile.score_tables import listed, table_shape

CLASSES = library.define(
    "attention_classes(Tensor[] operands, SymInt[] numbers, SymInt[] sizes, int[] block, "
    "str program) -> Tensor"
)
"""Operands and numbers as the mask reads them, sizes [B, H, S, K], rows and columns of a block; the
result is int8 [B or 1, H or 1, M, N], contiguous."""

TABLE = library.define(
    "attention_table(Tensor classes, SymInt[] sizes, int[] block, int[] tile, bool transposed) -> "
    "Tensor"
)
"""Classes of blocks of so many rows and columns, of scores of sizes [S, K]; the result, of tiles of
so many, is that of `listed`."""


def _classes(
    operands: Sequence[Tensor],
    numbers: Sequence[int],
    sizes: Sequence[int],
    block: Sequence[int],
    program: str,
) -> Tensor:
    from iocompiler.runtime.attention_classes import mask  # not before it runs

    asked = mask(parsed(program), operands, numbers, Grid(*sizes, *block))

    def partial() -> Tensor:  # every block is looked at, score by score
        return operands[0].new_ones(asked.shape, dtype=torch.int8)

    return template_or("the blocks of a mask", lambda: asked.classes(operands), partial)


def _classes_fake(
    operands: Sequence[Tensor],
    numbers: Sequence[int],
    sizes: Sequence[Any],
    block: Sequence[int],
    program: str,
) -> Tensor:
    shape = classes_shape(parsed(program), Grid(*sizes, *block))
    return operands[0].new_empty(shape, dtype=torch.int8)


library.implement("attention_classes", _classes, _classes_fake, launches=True)


def _table(
    classes: Tensor,
    sizes: Sequence[int],
    block: Sequence[int],
    tile: Sequence[int],
    transposed: bool,
) -> Tensor:
    from iocompiler.runtime.attention_blocks import lists  # not before it runs

    given = (tuple(sizes), tuple(block), tuple(tile))
    return template_or(
        "the lists of a mask's blocks",
        lambda: lists(
            tuple(classes.shape), *given, transposed=transposed, device=classes.device
        ).entries(classes),
        lambda: listed(classes, *given, transposed=transposed),
    )


def _table_fake(
    classes: Tensor,
    sizes: Sequence[Any],
    block: Sequence[int],
    tile: Sequence[int],
    transposed: bool,
) -> Tensor:
    shape = table_shape(classes.shape[:2], sizes, tile, transposed=transposed)
    return classes.new_empty(shape, dtype=torch.int32)


library.implement("attention_table", _table, _table_fake, launches=True)
