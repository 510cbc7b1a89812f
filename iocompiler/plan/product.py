"""What a matmul template computes, and how it walks it: part of a `MatmulStep`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from iocompiler.tile.index import Axis, Size, product
from iocompiler.tile.program import Buffer, TileProgram

# the axes of an epilogue are named after the direction they lie in: batch, rows, columns
DIRECTIONS = ("b", "m", "n")
# at multiples of as much, loads are whole and the copy engine takes an operand
ALIGNED_BYTES = 16


@dataclass(frozen=True)
class MatmulTile:
    """How the matmul template (`codegen/kernels/matmul.py`) walks its products.

    A tile of ``m`` x ``n`` results is summed ``k`` of the inner extent at a time, with the loads of
    ``num_stages - 1`` further steps in flight. Tiles are taken down ``group`` rows of tiles at a
    time, so that neighbours read the same operands. The epilogue runs on the tile in ``parts``
    pieces; ``programs`` programs walk all tiles, or each has one where that is 0.

    ``loads``: operands come by pointers, whatever their strides, or by the descriptors of Hopper's
    copy engine (`codegen/kernels/matmul_descriptors.py`), where `Product.takes_descriptors`; then
    ``programs`` is not 0.
    """

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    group: int = 8
    parts: int = 1
    programs: int = 0
    loads: Literal["pointers", "descriptors"] = "pointers"


UNCHOSEN = MatmulTile(0, 0, 0, 0, 0)
"""The tile of a step nobody has chosen one for."""


@dataclass(frozen=True)
class Term:
    """A product that is added to the first: its inner extent ``k``, and the strides of its left and
    right operand as in `Product`.
    """

    k: Size
    left: tuple[Size, Size, Size]
    right: tuple[Size, Size, Size]


@dataclass(frozen=True)
class Product:
    """``batch`` products of a left [m, k] and one or two right [k, n] matrices of ``dtype``, summed
    in float32.

    ``left`` and ``rights`` are strides in elements: along rows, along columns, along the batch;
    ``starts`` the elements at which the right ones begin in their tensors. The product of one right
    operand is added up with those of ``more``, in one sum. ``beside`` are other products that one
    launch makes, each with its epilogue, none with a batch; what ``shares`` names, "left" or
    "right", is the operand of the first of them.
    ``aligned``: each starts at a multiple of 16 bytes where the tensor does whose memory it shows.
    """

    batch: Size
    m: Size
    n: Size
    k: Size
    dtype: torch.dtype
    left: tuple[Size, Size, Size]
    rights: tuple[tuple[Size, Size, Size], ...]
    starts: tuple[Size, ...]
    aligned: bool = True
    more: tuple[Term, ...] = ()
    beside: tuple[tuple[Product, TileProgram], ...] = ()
    shares: Literal["", "left", "right"] = ""

    @property
    def depths(self) -> tuple[Size, ...]:
        """The inner extent of each product that is added up."""
        return (self.k, *(term.k for term in self.more))

    @property
    def lefts(self) -> tuple[tuple[Size, Size, Size], ...]:
        """The strides of every left operand."""
        return (self.left, *(term.left for term in self.more))

    @property
    def all_rights(self) -> tuple[tuple[Size, Size, Size], ...]:
        """The strides of every right operand."""
        return (*self.rights, *(term.right for term in self.more))

    @property
    def operands(self) -> tuple[Buffer, ...]:
        """What the products read, those beside left out, as parameters of a kernel: "left", "right"
        and "second"; then "left1", "right1" and so on of those that are added.
        """
        return tuple(
            Buffer(name, self.dtype, "in", start + _extent((*shape, self.batch), strides))
            for name, shape, strides, start in self._sides
        )

    @property
    def elements_read(self) -> tuple[Size, ...]:
        """Distinct elements of each operand: one that the batch shares is there once, what another
        product reads not at all.
        """
        return tuple(
            product([n for n, stride in zip((*shape, self.batch), s, strict=True) if stride != 0])
            if name != self.shares
            else 0
            for name, shape, s, _ in self._sides
        )

    @property
    def _sides(self) -> list[tuple[str, tuple[Size, Size], tuple[Size, Size, Size], Size]]:
        """Of each operand: name, shape, strides and where it begins."""
        named = zip(("right", "second"), self.rights, self.starts, strict=False)
        sides = [("left", (self.m, self.k), self.left, 0)]
        sides += [(name, (self.k, self.n), strides, start) for name, strides, start in named]
        for place, term in enumerate(self.more, 1):
            sides.append((f"left{place}", (self.m, term.k), term.left, 0))
            sides.append((f"right{place}", (term.k, self.n), term.right, 0))
        return sides

    @property
    def takes_descriptors(self) -> bool:
        """Whether every operand is one matrix, with rows or columns that run along memory and start
        at multiples of 16 bytes wherever the matrix does; those of one place in the kernel lie
        alike.
        """
        if not all(isinstance(size, int) and size for size in (self.n, *self.depths)):
            return False
        made = [self, *(other for other, _ in self.beside)]
        if not all(other.takes_descriptors and other.k == self.k for other, _ in self.beside):
            return False
        if self.more or self.beside:
            lefts = {side[1] == 1 for each in made for side in each.lefts}
            rights = {side[0] == 1 for each in made for side in each.all_rights}
            if len(lefts) > 1 or len(rights) > 1:
                return False
        strides = (*self.lefts, *self.all_rights)
        return self.aligned and self.batch == 1 and all(map(self._strides_fit, strides))

    def _strides_fit(self, strides: tuple[Size, Size, Size]) -> bool:
        row, column, _ = strides
        leading = row if column == 1 else column if row == 1 else 0
        return leading != 0 and self.is_whole(leading)

    def is_whole(self, elements: Size) -> bool:
        """Whether so many elements are a multiple of 16 bytes."""
        return isinstance(elements, int) and elements * self.dtype.itemsize % ALIGNED_BYTES == 0

    @property
    def size_symbols(self) -> frozenset[str]:
        strides = sum((*self.lefts, *self.all_rights), self.starts)
        sizes: tuple[Size, ...] = (self.batch, self.m, self.n, *self.depths, *strides)
        return frozenset(s.name for n in sizes if not isinstance(n, int) for s in n.free_symbols)


def _extent(shape: tuple[Size, ...], strides: tuple[Size, ...]) -> Size:
    """Elements from a tensor's first to its last."""
    if any(isinstance(size, int) and size == 0 for size in shape):
        return 0
    return sum(((n - 1) * stride for n, stride in zip(shape, strides, strict=True)), 1)


def along(program: TileProgram, direction: str) -> tuple[Axis, ...]:
    """The axes of an epilogue that lie along b, m or n."""
    return tuple(a for a in program.parallel if a.name.startswith(direction))
