"""Integers of a tensor as an affine function of their place in it, and what views make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from iocompiler.graph.sizes import known

Integer: TypeAlias = "int | torch.SymInt"

_INT32 = torch.iinfo(torch.int32)


@dataclass(frozen=True)
class Affine:
    """The element at (i0, i1, ...) is ``const + steps[0] * i0 + steps[1] * i1 + ...``.

    The step of a dim of size 1 is 0.
    """

    const: Integer
    steps: tuple[Integer, ...]
    sizes: tuple[Integer, ...]

    @staticmethod
    def constant(value: Integer, sizes: Sequence[Integer]) -> Affine:
        return Affine(value, (0,) * len(sizes), tuple(sizes))

    @property
    def is_constant(self) -> bool:
        return all(known(step == 0) for step in self.steps)

    @property
    def rank(self) -> int:
        return len(self.sizes)

    def bounds(self) -> tuple[Integer, Integer] | None:
        """The least and the greatest element; None where the sign of a step is not known."""
        least = greatest = self.const
        for step, size in zip(self.steps, self.sizes, strict=True):
            if known(step >= 0):
                greatest = greatest + step * (size - 1)
            elif known(step <= 0):
                least = least + step * (size - 1)
            else:
                return None
        return least, greatest

    def fits_int32(self) -> bool:
        """Whether no element is beyond 32 bits, whatever the sizes."""
        limits = self.bounds()
        if limits is None:
            return False
        return known(limits[0] >= _INT32.min) and known(limits[1] <= _INT32.max)

    # --- arithmetic

    def plus(self, other: Affine) -> Affine:
        """The elementwise sum of two of the same sizes."""
        steps = tuple(a + b for a, b in zip(self.steps, other.steps, strict=True))
        return replace(self, const=self.const + other.const, steps=steps)

    def times(self, factor: Integer) -> Affine:
        return replace(
            self, const=self.const * factor, steps=tuple(step * factor for step in self.steps)
        )

    # --- views

    def expanded(self, sizes: Sequence[Integer]) -> Affine | None:
        """Broadcast to ``sizes``: what is repeated has step 0."""
        new = len(sizes) - self.rank
        for size, wide in zip(self.sizes, sizes[new:], strict=True):
            if not known(size == 1) and not known(size == wide):
                return None
        return Affine(self.const, (0,) * new + self.steps, tuple(sizes))

    def permuted(self, order: Sequence[int]) -> Affine:
        steps, sizes = ([each[d] for d in order] for each in (self.steps, self.sizes))
        return replace(self, steps=tuple(steps), sizes=tuple(sizes))

    def selected(self, dim: int, index: Integer) -> Affine:
        keep = [d for d in range(self.rank) if d != dim % self.rank]
        return replace(self.permuted(keep), const=self.const + self.steps[dim] * index)

    def sliced(self, dim: int, start: Integer, step: Integer, size: Integer) -> Affine:
        at = dim % self.rank
        steps = [s * step if d == at else s for d, s in enumerate(self.steps)]
        if known(size == 1):
            steps[at] = 0
        sizes = [size if d == at else s for d, s in enumerate(self.sizes)]
        return Affine(self.const + self.steps[at] * start, tuple(steps), tuple(sizes))

    def flipped(self, dim: int) -> Affine:
        at = dim % self.rank
        steps = [-s if d == at else s for d, s in enumerate(self.steps)]
        return replace(
            self, const=self.const + self.steps[at] * (self.sizes[at] - 1), steps=tuple(steps)
        )

    def reshaped(self, sizes: Sequence[Integer]) -> Affine | None:
        """The same elements in row-major order; None where they are no longer affine."""
        old = [d for d, size in enumerate(self.sizes) if not known(size == 1)]
        new = [d for d, size in enumerate(sizes) if not known(size == 1)]
        steps: list[Integer] = [0] * len(sizes)
        while old or new:
            run = _first_equal([self.sizes[d] for d in old], [sizes[d] for d in new])
            if run is None:
                return None
            merged, split = old[: run[0]], new[: run[1]]
            step = self._together(merged)
            if step is None:
                return None
            for d in reversed(split):
                steps[d] = step
                step = step * sizes[d]
            old, new = old[run[0] :], new[run[1] :]
        return Affine(self.const, tuple(steps), tuple(sizes))

    def _together(self, dims: Sequence[int]) -> Integer | None:
        """The step from one element to the next along dims taken as one, in row-major order."""
        step = expected = self.steps[dims[-1]]
        for d in reversed(dims):
            if not known(self.steps[d] == expected):
                return None
            expected = expected * self.sizes[d]
        return step


def _first_equal(old: Sequence[Integer], new: Sequence[Integer]) -> tuple[int, int] | None:
    """How many sizes at the front of each have one product, as few as possible."""
    for total in range(2, len(old) + len(new) + 1):
        for a in range(max(1, total - len(new)), min(len(old), total - 1) + 1):
            if known(prod(old[:a]) == prod(new[: total - a])):
                return a, total - a
    return None


def guarded(condition: Any) -> bool:
    """Whether it holds; where only the sizes at hand say so, the graph is good for those alone
    for which it does.
    """
    try:
        return known(condition) or bool(condition)
    except GuardOnDataDependentSymNode:
        return False
