"""What a library makes of addresses: the form of a product, in sizes that may be symbols, or in
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar

import torch

from iocompiler.tile.index import Size

Strides: TypeAlias = tuple[Size, Size, Size]
S = TypeVar("S")
Activation: TypeAlias = Literal["gelu", "relu"]
"""What an epilogue computes: a GELU is that by tanh."""


@dataclass(frozen=True, order=True)
class Algorithm:
    """One of cuBLASLt's algorithms by its configuration, in NVIDIA's numbers, which tell algorithms
    apart among those that one version of the library proposes for a product. ``twin``: how many
    with the same numbers it proposes before this one.
    """

    id: int
    tile: int
    split_k: int
    reduction: int
    swizzling: int
    custom: int
    stages: int
    inner_shape: int
    cluster_shape: int
    twin: int = 0


@dataclass(frozen=True)
class LibraryProduct(Generic[S]):
    """``out[b, i, j] = sum over k of a[b, i, k] * b[b, k, j] + added[b, i, j]``, sums in float32.

    Strides are in elements, from one matrix, row, column to the next. ``added`` is a bias of n
    elements, with strides (0, 0, 1), or a matrix; with ``bias``, it is a matrix, and a bias of n
    elements is added too. With an ``activation``, ``out`` is that of all this, which may not be
    rounded yet; with ``sums`` too, the sums go there, rounded. ``stored`` is the result's dtype
    where it is not ``dtype``, that of the operands; nothing is added then.
    """

    batch: S
    m: S
    n: S
    k: S
    dtype: torch.dtype
    a: tuple[S, S, S]
    b: tuple[S, S, S]
    out: tuple[S, S, S]
    added: tuple[S, S, S] | None = None
    bias: bool = False
    sums: tuple[S, S, S] | None = None
    stored: torch.dtype | None = None
    activation: Activation | None = None

    @property
    def biased(self) -> bool:
        """Whether one row is added to all."""
        return self.bias or (self.added is not None and self.added[:2] == (0, 0))

    @property
    def matrix(self) -> tuple[S, S, S] | None:
        """The strides of the matrix that is added, if one is."""
        return self.added if self.bias or not self.biased else None

    @property
    def size_symbols(self) -> tuple[str, ...]:
        """The sizes it depends on, sorted."""
        sizes = (self.batch, self.m, self.n, self.k, *self.a, *self.b, *self.out)
        beside = (*(self.added or ()), *(self.sums or ()))
        found = {name for size in (*sizes, *beside) for name in _symbols(size)}
        return tuple(sorted(found))


Problem: TypeAlias = LibraryProduct[int]
"""A product in numbers."""


def _symbols(size: object) -> list[str]:
    return [symbol.name for symbol in getattr(size, "free_symbols", ())]
