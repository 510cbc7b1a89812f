"""What a library makes of addresses: the form of a product, in sizes that may be symbols."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from iocompiler.tile.index import Size

Strides = tuple[Size, Size, Size]


@dataclass(frozen=True)
class LibraryProduct:
    """out[b, i, j] = sum_k a[b, i, k] b[b, k, j] + added[b, i, j], summed in float32.

    Strides are in elements, along the batch, down rows, along a row. ``added`` are those of what is
    added, if anything is: (0, 0, 1) for a bias. With ``bias``, a bias is added to that matrix too.
    With ``sums``, these are those of what was described, and ``out`` is its GELU, by tanh.
    ``stored`` is the result's dtype, where it is not the operands'.
    `runtime.products.Problem` is the same in numbers.
    """

    batch: Size
    m: Size
    n: Size
    k: Size
    dtype: torch.dtype
    a: Strides
    b: Strides
    out: Strides
    added: Strides | None = None
    bias: bool = False
    sums: Strides | None = None
    stored: torch.dtype | None = None

    @property
    def size_symbols(self) -> tuple[str, ...]:
        """The sizes it depends on, sorted."""
        sizes = (self.batch, self.m, self.n, self.k, *self.a, *self.b, *self.out)
        beside = (*(self.added or ()), *(self.sums or ()))
        found = [size for size in (*sizes, *beside) if not isinstance(size, int)]
        return tuple(sorted({symbol.name for size in found for symbol in size.free_symbols}))
