"""Linear + divergence chunk by chunk: both logits of a chunk, their losses and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from iocompiler.ops import linear_cross_entropy_chunks as chunks
from iocompiler.ops.linear_cross_entropy_head import Head, scratch
from iocompiler.ops.linear_cross_entropy_products import filled, is_unlike_products, wide
from iocompiler.ops.linear_cross_entropy_rows import Rows, Setting
from iocompiler.ops.linear_divergence_rows import Divergence, Pair, evaluate


class Linear(NamedTuple):
    """A head: x [T, D], weight [V, D], bias [V]; without a weight x is its result, [T, V]."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None


def scratch_bytes(rows: int, vocabulary: int, *heads: tuple[int, int]) -> int:
    """What `walk` allocates on a GPU beside its results.

    Args:
        heads: (width, itemsize) of those that have a weight.
    """
    itemsizes = [itemsize for _, itemsize in heads]
    held = chunks.chunk_rows(rows, vocabulary, sum(itemsizes), chunks.SCRATCH_BYTES)
    again = [width for width, itemsize in heads if is_unlike_products(vocabulary, itemsize)]
    weights = sum(w * itemsize for w, itemsize in heads if w in again)
    return filled(vocabulary) * (held * sum(itemsizes) + weights)


def walk(
    first: Linear,
    second: Linear,
    target: Tensor | None,
    shares: tuple[Tensor | None, Tensor | None, Tensor],
    setting: Setting,
    divergence: Divergence,
    needed: Sequence[bool] = (False,) * 6,
) -> tuple[Tensor | None, ...]:
    """(losses [T], then the gradients of both heads' parts), those that are ``needed``.

    Args:
        target: [T] int64, or None: no cross-entropy.
        shares: [T] each: coefficient and squared as `Rows` has them; what divergences are
            multiplied by.
        needed: of x, weight, bias of the first, and of the second, which then has a weight.
    """
    assert first.weight is not None
    rows, vocabulary = first.x.shape[0], first.weight.shape[0]
    losses = first.x.new_zeros((rows,), dtype=wide(first.x))
    made = [_Made(linear, vocabulary, some) for linear, some in (
        (first, needed[:3]), (second, needed[3:])
    )]  # fmt: skip
    size = sum(each.itemsize for each in made)
    chunk = chunks.chunk_rows(rows, vocabulary, size, chunks.SCRATCH_BYTES)
    for each in made:
        each.hold(chunk)
    *rows_of, share = shares
    for begin in range(0, rows, max(chunk, 1)):
        some = slice(begin, min(begin + chunk, rows))
        (logits, gradient), (other, other_gradient) = (each.logits(some) for each in made)
        pair = Pair(
            logits,
            other,
            target if target is None else target[some].contiguous(),
            share[some].contiguous(),
            losses[some],
            gradient,
            other_gradient,
        )
        evaluate(pair, Rows(*rows_of).part(some), setting, divergence)
        for each, d in zip(made, (gradient, other_gradient), strict=True):
            each.take(some, d)
    return losses, *made[0].gradients(), *made[1].gradients()


class _Made:
    """The rows of logits that a head makes, chunk by chunk, or that are given."""

    def __init__(self, linear: Linear, vocabulary: int, needed: Sequence[bool]) -> None:
        self._x, self._vocabulary, self._needed = linear.x, vocabulary, any(needed)
        self._head: Head | None = None
        self.itemsize = 0
        if linear.weight is not None:
            self._head = Head(linear.x, linear.weight, linear.bias, needed)
            self.itemsize = linear.x.element_size()
        elif linear.x.stride(1) != 1:
            self._x = linear.x.contiguous()

    def hold(self, rows: int) -> None:
        if self._head is not None:
            self._scratch = scratch(self._x, self._vocabulary, rows)

    def logits(self, some: slice) -> tuple[Tensor, Tensor | None]:
        """[rows, V], and where their gradient goes, which is the same memory."""
        if self._head is None:
            return self._x[some], None
        made = self._scratch[: some.stop - some.start]
        self._head.project(some, made)
        return made[:, : self._vocabulary], made if self._needed else None

    def take(self, some: slice, d: Tensor | None) -> None:
        if self._head is not None and d is not None:
            self._head.take(some, d)

    def gradients(self) -> tuple[Tensor | None, ...]:
        return (None, None, None) if self._head is None else self._head.gradients()
