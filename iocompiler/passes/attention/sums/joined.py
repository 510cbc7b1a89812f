"""Scores that are a sum of products, as the one product of their operands put together along the
width: DeepSeek's, of a part with and a part without positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.graph.sizes import known
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.arrange import Arranger
from iocompiler.passes.attention.dims.axes import size
from iocompiler.passes.attention.dims.views import Operand
from iocompiler.passes.attention.reading import contraction
from iocompiler.passes.attention.reading.description import Declined
from iocompiler.passes.attention.sums.parts import Part, Side, batched, read, row_of, separable

aten = torch.ops.aten
_MATRICES = 3
"""Without a kernel of its own, a sum of two products writes and reads so many matrices of scores
more than one product does."""


@dataclass(frozen=True)
class Joined:
    """A sum, what it was a sum of, and what its readers read instead (itself, of other terms)."""

    total: Node
    terms: tuple[Any, ...]
    product: Node

    def undo(self, gm: GraphModule) -> None:
        """Let the readers read the sum again."""
        if self.product is not self.total:
            return edit.bypass(gm, self.product, self.total)
        others = self.total.all_input_nodes
        edit.respell(self.total, self.total.target, self.terms, dict(self.total.kwargs))
        for each in others:
            edit.erase(gm, each)


def join(gm: GraphModule, total: Node) -> Joined:
    """Let one product stand for a sum of two.

    Before: ``add(matmul(q, k.mT), mul(matmul(r, s.mT), 0.5))``
    After: ``matmul(cat([q, mul(r, 0.5)], -1), cat([k, s], -1).mT)``

    Raises:
        Declined: they are not of the same rows and columns, or more would move than now.
    """
    parts = read(gm, total)
    if not separable(parts) or any(map(_is_parted, parts)):
        return _added(gm, total, parts)
    row = row_of(parts)
    try:
        _check_price(total, parts, row)
    except Declined:
        if not any(_is_small(part, total) for part in parts):
            raise
        return _added(gm, total, parts)
    operands = [Operand(((s.node, s.dims),)) for p in parts for s in (p.rows, p.columns)]
    arranger = Arranger(gm, total, operands)
    rows = _together(arranger, parts, [p.rows for p in parts], row)
    columns = _together(arranger, parts, [p.columns for p in parts], len(parts[0].dims) - 1)
    product = arranger.call(aten.matmul.default, rows, arranger.call(aten.mT.default, columns))
    rank = len(parts[0].dims)
    if row != rank - 2:
        places = [*(d for d in range(rank - 1) if d != row), row]
        product = arranger.call(
            aten.permute.default, product, [*(places.index(d) for d in range(rank - 1)), rank - 1]
        )
    if not views.alike(product, total):
        raise Declined("the scores are widened by a sum")
    if views.dtype(product) != views.dtype(total):
        product = arranger.call(aten.to.dtype, product, views.dtype(total))
    for part in parts:
        for bias in part.biases:
            term = arranger.arranged(bias.node, bias.dims, part.dims, widen=False)
            product = arranger.call(aten.add.Tensor, product, term, alpha=bias.factor)
    total.replace_all_uses_with(product)
    return Joined(total, total.args, product)


def _added(gm: GraphModule, total: Node, parts: Sequence[Part]) -> Joined:
    """The sum with the product that is none of a row with a column (of a query with the position of
    a key relative to it, say), or the smaller one, as a tensor that is added.
    """
    alone = [n for n, part in enumerate(parts) if separable([part])]
    if not alone or contraction.read(total) is not None:
        raise Declined("the scores are a sum of products over other rows and columns")
    kept = max(alone, key=lambda n: (not _is_small(parts[n], total), batched(parts[n])))
    sides = list(total.args[:2])
    # the same tensor, but no scores to who reads them
    sides[1 - kept] = edit.call(gm, aten.positive.default, (sides[1 - kept],), {}, near=total)
    before = total.args
    edit.respell(total, total.target, (*sides, *before[2:]), dict(total.kwargs))
    return Joined(total, before, total)


def _is_parted(part: Part) -> bool:
    """Whether its columns are several dims of the scores meanwhile, see `rejoined`."""
    return len(part.columns.places(part.dims) - part.rows.places(part.dims)) > 1


def _is_small(part: Part, total: Node) -> bool:
    """Whether a product is of at most half as many elements as the scores: that of a query with the
    rows of the image that keys lie in, say.
    """
    made = math.prod(size(group) for group in part.dims)
    return bool(known(2 * made <= math.prod(views.shape(total))))


def _check_price(total: Node, parts: Sequence[Part], row: int) -> None:
    """Raise `Declined` where the operands together are more than the matrices they stand for: few
    queries over a cache of keys, say.
    """
    shape = views.shape(total)
    moved: Any = 0
    for sides, place in (([p.rows for p in parts], row), ([p.columns for p in parts], -1)):
        elements: Any = sum(size(part.over) for part in parts)
        for d in _kept(parts, sides, place % len(shape)):
            elements = elements * shape[d]
        moved = moved + 2 * elements
    saved = 2 * _MATRICES * math.prod(shape)
    if known(moved >= saved):
        raise Declined(f"its parts put together would move {moved} elements to save {saved}")


def _kept(parts: Sequence[Part], sides: Sequence[Side], place: int) -> list[int]:
    """The dims of the scores that some operand on a side has, and that of its own last."""
    own = [side.places(part.dims) for part, side in zip(parts, sides, strict=True)]
    return [*sorted(set().union(*own) - {place}), place]


def _together(arranger: Arranger, parts: Sequence[Part], sides: Sequence[Side], place: int) -> Node:
    """The operands side by side along the width, with the dims of the scores that any has."""
    kept = _kept(parts, sides, place)
    rank = len(parts[0].dims)
    other = row_of(parts) if place == rank - 1 else rank - 1
    order = [*(d for d in range(rank) if d not in (place, other)), place]
    pieces = []
    for part, side in zip(parts, sides, strict=True):
        target = tuple(part.dims[d] if d in kept else () for d in order)
        piece = arranger.arranged(side.node, side.dims, (*target, part.over))
        for factor, inverse in part.factors if place != rank - 1 else ():
            piece = arranger.call(aten.div.Tensor if inverse else aten.mul.Tensor, piece, factor)
        pieces.append(piece)
    if len({views.dtype(piece) for piece in pieces}) > 1:
        raise Declined("the scores are a sum of products in several dtypes")
    return arranger.call(aten.cat.default, _alike(arranger, pieces), -1)


def _alike(arranger: Arranger, pieces: Sequence[Node]) -> list[Node]:
    """The pieces repeated along dims that only some have."""
    shapes = [views.shape(piece) for piece in pieces]
    sizes: list[Any] = []
    for d in range(len(shapes[0]) - 1):
        widest = next((n for n, s in enumerate(shapes) if not known(s[d] == 1)), 0)
        extent: Any = shapes[widest][d]
        if not isinstance(extent, int):
            extent = arranger.call(aten.sym_size.int, pieces[widest], d)
        sizes.append(extent)
    pairs = zip(*(shape[:-1] for shape in shapes), strict=True)
    if all(known(n == each[0]) for each in pairs for n in each):
        return list(pieces)
    return [arranger.call(aten.expand.default, piece, [*sizes, -1]) for piece in pieces]
