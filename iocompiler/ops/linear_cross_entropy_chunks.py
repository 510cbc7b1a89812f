"""Linear + cross-entropy chunk by chunk: the logits of a chunk, their losses, their gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from iocompiler.ops import linear_cross_entropy_copied as copied
from iocompiler.ops.linear_cross_entropy_head import Head, scratch
from iocompiler.ops.linear_cross_entropy_products import (
    ROWS,
    filled,
    is_aligned,
    is_unlike_products,
    wide,
)
from iocompiler.ops.linear_cross_entropy_rows import Piece, Rows, Setting, evaluate

# What the logits of one chunk may take, in bytes: at a vocabulary of 128256 in bfloat16 these are
# 2048 rows: on an H200 1.13 x the three products alone, where 1024 rows took 1.21 and 4096 1.13.
SCRATCH_BYTES = 1 << 29
# The same where the logits are kept, whole, by the user: there is room for their gradient too, and
# each further chunk reads and writes the weight's gradient once more.
KEPT_SCRATCH_BYTES = 1 << 31


def chunk_rows(rows: int, vocabulary: int, itemsize: int, budget: int) -> int:
    """Rows of a chunk: as many as ``budget`` bytes hold, then evened out over the chunks."""
    most = max(budget // (filled(vocabulary) * itemsize) // ROWS, 1) * ROWS
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
    head = Head(x, weight, bias, needed)
    room = _Room(x, vocabulary, any(needed), kept)
    for first in range(0, rows, max(room.chunk, 1)):
        some = slice(first, min(first + room.chunk, rows))
        made = room.logits(some)
        head.project(some, made)
        d = room.gradient(some)
        piece = Piece(made[:, :vocabulary], target[some], losses[some], d, room.copy(some))
        evaluate(piece, rows_of.part(some), setting)
        if d is not None:
            head.take(some, d)
    return losses, *head.gradients()


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
        self._scratch = scratch(x, vocabulary, held)

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
