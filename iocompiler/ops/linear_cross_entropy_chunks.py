"""Linear + cross-entropy chunk by chunk: the logits of a chunk, their losses, their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iocompiler.ops import linear_cross_entropy_copied as copied
from iocompiler.ops.linear_cross_entropy_products import (
    ROWS,
    add_outer,
    filled,
    is_aligned,
    is_unlike_products,
    project,
    wide,
    with_zeros,
)
from iocompiler.ops.linear_cross_entropy_rows import Piece, Rows, Setting, evaluate
from iocompiler.ops.target import on_gpu

# What the logits of one chunk may take, in bytes: at a vocabulary of 128256 in bfloat16 these are
# 2048 rows: on an H200 1.13 x the three products alone, where 1024 rows took 1.21 and 4096 1.13.
SCRATCH_BYTES = 1 << 29
# The same where the logits are kept, whole, by the user: there is room for their gradient too, and
# each further chunk reads and writes the weight's gradient once more.
KEPT_SCRATCH_BYTES = 1 << 31


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype the weight's gradient is summed in: unscaled sums may leave float16's range."""
    return torch.float32 if dtype == torch.float16 else dtype


def chunk_rows(rows: int, vocabulary: int, itemsize: int, scratch: int) -> int:
    """Rows of a chunk: as many as ``scratch`` bytes hold, then evened out over the chunks."""
    most = max(scratch // (filled(vocabulary) * itemsize) // ROWS, 1) * ROWS
    chunks = -(-rows // most)
    return min(rows, -(-rows // max(chunks, 1) // ROWS) * ROWS)


def scratch_bytes(
    rows: int, vocabulary: int, width: int, itemsize: int, *, gradient: bool, kept: bool
) -> int:
    """What `walk` allocates on a GPU beside its results, x being [rows, width]."""
    if kept and not (gradient or is_aligned(vocabulary, itemsize)):
        return copied.scratch_bytes(rows, vocabulary, width, itemsize)
    held = _chunk(rows, vocabulary, itemsize, gradient=gradient, kept=kept)[1]
    unlike = is_unlike_products(vocabulary, itemsize)
    return filled(vocabulary) * itemsize * (held + (width if unlike else 0))


def walk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rows_of: Rows,
    setting: Setting,
    needed: Sequence[bool] = (False, False, False),
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(losses [T], dx, dweight, dbias), gradients only where ``needed`` says so.

    Args:
        x: [T, D]; weight: [V, D]; bias: [V]; target: [T] int64.
        needed: of x, weight, bias.
        kept: [T, V], contiguous, allocated by itself: the logits are written there.
    """
    rows, vocabulary = x.shape[0], weight.shape[0]
    x, target = x.contiguous(), target.contiguous()
    if kept is not None and not (any(needed) or is_aligned(vocabulary, x.element_size())):
        losses = copied.walk_copied(x, weight, bias, target, rows_of, setting, kept)
        return losses, None, None, None
    losses = x.new_zeros((rows,), dtype=wide(x))
    head = _Head(weight, bias)
    dx, dweight, dbias = head.empty_gradients(x, needed)
    room = _Room(x, vocabulary, any(needed), kept)
    for first in range(0, rows, max(room.chunk, 1)):
        some = slice(first, min(first + room.chunk, rows))
        made = room.logits(some)
        project(x[some], head.weight, head.bias, made)
        d = room.gradient(some)
        piece = Piece(made[:, :vocabulary], target[some], losses[some], d, room.copy(some))
        evaluate(piece, rows_of.part(some), setting)
        if d is None:
            continue
        if dx is not None:
            torch.mm(d, head.weight, out=dx[some])
        if dweight is not None:
            add_outer(d, x[some], dweight, first=not first)
        if dbias is not None:
            dbias += d.sum(0, dtype=wide(x))
    dweight, dbias = (d if d is None else d[:vocabulary] for d in (dweight, dbias))
    return losses, dx, dweight, dbias


class _Head:
    """The weight and the bias as products like them.

    On a GPU the extents of a product in half precision must be aligned (see `aligned_mm.py` for
    why): an odd vocabulary is filled up with zeros, once. A product over it in two parts would
    round in between, and what the second adds to a first that is nearly a row of the weight would
    be lost in every row.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        columns = _columns(weight.shape[0], weight)
        if columns != weight.shape[0]:
            self.weight = with_zeros(weight, columns)
            self.bias = None if bias is None else with_zeros(bias, columns)

    def empty_gradients(
        self, x: Tensor, needed: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of x, weight and bias; the weight's is written whole by the first chunk there is."""
        of_x, of_weight, of_bias = needed
        shape, dtype = tuple(self.weight.shape), accumulated(self.weight.dtype)
        new = self.weight.new_empty if x.shape[0] else self.weight.new_zeros
        return (
            x.new_empty(x.shape) if of_x else None,
            new(shape, dtype=dtype) if of_weight else None,
            x.new_zeros(shape[:1], dtype=wide(x)) if of_bias else None,
        )


class _Room:
    """Where the logits of a chunk are made and their gradient is written.

    Logits that are kept are made in their place where its rows are aligned, else, with a gradient
    (without one: `walk_copied`), in the scratch, from where the row kernel copies them. Their
    gradient is in the scratch, where it may take their place.

    Attributes:
        chunk: rows of one.
    """

    def __init__(self, x: Tensor, vocabulary: int, gradient: bool, kept: Tensor | None) -> None:
        itemsize = x.element_size()
        self._kept, self._gradient = kept, gradient
        self._in_place = kept is not None and is_aligned(vocabulary, itemsize)
        self.chunk, held = _chunk(
            x.shape[0], vocabulary, itemsize, gradient=gradient, kept=kept is not None
        )
        columns = _columns(vocabulary, x)
        aligned = not on_gpu(x) or is_aligned(columns, itemsize)
        row = columns if aligned else filled(columns)
        self._scratch = x.new_empty((held, row))[:, :columns]

    def logits(self, some: slice) -> Tensor:
        """[rows, columns], where the products of ``some`` rows go."""
        if self._in_place and self._kept is not None:
            return self._kept[some]
        return self._rows(some)

    def gradient(self, some: slice) -> Tensor | None:
        """[rows, columns], where their gradient goes."""
        return self._rows(some) if self._gradient else None

    def copy(self, some: slice) -> Tensor | None:
        """[rows, V], where they go if they are made elsewhere."""
        return None if self._kept is None or self._in_place else self._kept[some]

    def _rows(self, some: slice) -> Tensor:
        return self._scratch[: some.stop - some.start]


def _chunk(
    rows: int, vocabulary: int, itemsize: int, *, gradient: bool, kept: bool
) -> tuple[int, int]:
    """(rows of a chunk, rows of the scratch)."""
    if kept and not gradient:
        return rows, 0  # in place; one product is fastest, and nothing else is gained
    budget = KEPT_SCRATCH_BYTES if kept else SCRATCH_BYTES
    chunk = chunk_rows(rows, vocabulary, itemsize, budget)
    return chunk, chunk


def _columns(vocabulary: int, x: Tensor) -> int:
    """Classes, with those that are filled up."""
    odd = is_unlike_products(vocabulary, x.element_size())
    return filled(vocabulary) if odd and on_gpu(x) else vocabulary
