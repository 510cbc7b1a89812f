"""Matrix products with odd extents, in parts the matrix units like.

    iocompiler::aligned_mm(Tensor a, Tensor b, Tensor? bias, SymInt row) -> Tensor

cuBLAS takes its fast kernels on Hopper only where every extent and row stride is a multiple of
16 bytes; a vocabulary of 50257 columns in bfloat16 falls onto kernels four to seven times slower.
Here each odd extent is cut into an aligned part and a tail of at most 63: the aligned product
does the work, the tails are small. Rows of the result begin ``row`` elements apart. Where that is
aligned, products are written in place; where it is not (results that leave a graph lie as the user
has them), they are written to a scratch that stays in L2, and copied to their place from there: the
result is never twice in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from iocompiler.ops import library
from iocompiler.ops.multiply import multiply

# Parts begin at multiples of this many elements.
STEP = 64
# Rows that begin at multiples of this many bytes are written in place.
ALIGNED = 16
# The scratch: a third of an H100's L2. Pieces are multiples of the library's largest tile.
SCRATCH_BYTES = 1 << 24
TILE = 256

ALIGNED_MM = library.define(
    "aligned_mm(Tensor a, Tensor b, Tensor? bias, SymInt row) -> Tensor",
    torch.Tag.pt2_compliant_tag,
)


def _aligned_mm(a: Tensor, b: Tensor, bias: Tensor | None, row: int) -> Tensor:
    """``a @ b (+ bias)``: a [M, K], b [K, N], bias [N]; the result [M, N] has strides (row, 1)."""
    out = _empty(a, b, row)
    if row * out.element_size() % ALIGNED == 0:
        _multiply(a, b, bias, out)
        return out
    pieces = list(_pieces(a.shape[0], b.shape[1], out.element_size()))
    scratch = _scratch(out, pieces)
    for rows, columns in pieces:
        place = out[rows, columns]
        piece = scratch[: place.shape[0], : place.shape[1]]
        _multiply(a[rows], b[:, columns], None if bias is None else bias[columns], piece)
        place.copy_(piece)
    return out


def _pieces(rows: int, columns: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
    """The result in pieces that fit the scratch, cut along its longer extent: the operand that is
    read again for each piece is then the smaller one.
    """
    across = columns >= rows
    long, short = (columns, rows) if across else (rows, columns)
    fitting = SCRATCH_BYTES // (max(short, 1) * itemsize)
    step = max(fitting // TILE, 1) * TILE
    for first in range(0, long, step):
        part = slice(first, min(first + step, long))
        yield (slice(0, rows), part) if across else (part, slice(0, columns))


def _scratch(out: Tensor, pieces: list[tuple[slice, slice]]) -> Tensor:
    """As large as the largest piece, its rows aligned."""
    rows = max((r.stop - r.start for r, _ in pieces), default=0)
    columns = max((c.stop - c.start for _, c in pieces), default=0)
    return out.new_empty((rows, -(-columns // STEP) * STEP))


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    for rows in _parts(a.shape[0]):
        for columns in _parts(b.shape[1]):
            part, added = out[rows, columns], None if bias is None else bias[columns]
            depths = _parts(a.shape[1])
            if len(depths) == 1:  # a bias in the product's epilogue, where whole
                multiply(a[rows], b[:, columns], part, bias=added)
            else:
                part.copy_(_in_depths(a[rows], b[:, columns], depths, added))


def _in_depths(a: Tensor, b: Tensor, depths: list[slice], bias: Tensor | None) -> Tensor:
    """The sum of products over parts of the inner extent, in float32: what is small in each element
    would be lost in all of them alike, were the first product rounded before the second is added.
    """
    total = a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.float32)
    for depth in depths:
        total += _wide(a[:, depth], b[depth])
    return total if bias is None else total + bias


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """A product that is not rounded to its operands' precision."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _parts(extent: int) -> list[slice]:
    """An extent as its aligned part and its tail, the empty ones left out."""
    cut = extent - extent % STEP
    return [part for part in (slice(0, cut), slice(cut, extent)) if part.start < part.stop]


def _empty(a: Tensor, b: Tensor, row: int) -> Tensor:
    return torch.empty_strided((a.shape[0], b.shape[1]), (row, 1), dtype=a.dtype, device=a.device)


def _aligned_mm_fake(a: Tensor, b: Tensor, bias: Tensor | None, row: int) -> Tensor:
    return _empty(a, b, row)


library.implement("aligned_mm", _aligned_mm, _aligned_mm_fake, multiplies=True)
