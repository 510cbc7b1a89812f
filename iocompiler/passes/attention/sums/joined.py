"""Scores that are a sum of products, as the one product of their operands put together along the
width: DeepSeek's, of a part with and a part without positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.graph import view
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.arrange import Arranger
from iocompiler.passes.attention.dims.axes import Dims, Group, flat, known, resolve, resolved, size
from iocompiler.passes.attention.dims.views import Operand
from iocompiler.passes.attention.reading import contraction, scores
from iocompiler.passes.attention.reading.description import Bias, Cast, Declined, Inverse, Scale
from iocompiler.passes.attention.reading.scores import Scores

aten = torch.ops.aten
_MATRICES = 3
"""Without a kernel of its own, a sum of two products writes and reads so many matrices of scores
more than one product does."""


@dataclass(frozen=True)
class _Side:
    """The operand of one product that has the rows (or the columns) of the scores."""

    node: Node
    dims: Dims

    def places(self, dims: Dims) -> set[int]:
        """The dims of the scores that it has."""
        own = set(flat(self.dims))
        return {d for d, group in enumerate(dims) if own & set(group)}


@dataclass(frozen=True)
class _Part:
    """One product of the sum: its operands, the dims of the scores in its axes, the axes it is
    contracted over, what it is multiplied by (and whether that divides), what is added to it.
    """

    rows: _Side
    columns: _Side
    dims: Dims
    over: Group
    factors: tuple[tuple[Any, bool], ...]
    biases: tuple[Bias, ...]


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
    parts = [_part(gm, total, *term) for term in _terms(total)]
    if not _separable(parts):
        return _added(gm, total, parts)
    row = _row(parts)
    _check_price(total, parts, row)
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


def _terms(total: Node) -> list[tuple[Scores, float]]:
    """The two products that a node adds, and what each is multiplied by there."""
    found = contraction.read(total)
    if found is not None:
        assert found.added is not None
        added = scores.read(found.added)
        own = scores.read(total, adds=False)
        assert added is not None
        assert own is not None
        return [(own, 1.0), (added, found.beta)]
    left, right = (scores.read(each) for each in total.args[:2])  # type: ignore[arg-type]
    assert left is not None
    assert right is not None
    alpha = total.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        raise Declined("a part of the scores is scaled by what is known at run time only")
    sign = -1.0 if total.target is aten.sub.Tensor else 1.0
    return [(left, 1.0), (right, sign * float(alpha))]


def _part(gm: GraphModule, total: Node, found: Scores, factor: float) -> _Part:
    dims = resolved(found.dims)
    _check_place(gm, total, found.nodes)
    if len(dims) != len(views.shape(total)) or len(dims) < 2:
        raise Declined("the scores are widened by a sum")
    factors: list[tuple[Any, bool]] = []
    biases: list[Bias] = []
    for step in (*found.steps, Scale(factor)):
        if isinstance(step, Scale) and not step.dims:
            inverse = isinstance(step.factor, Inverse)
            factors.append((step.factor.of if inverse else step.factor, inverse))
            if biases and not isinstance(step.factor, (int, float)):
                raise Declined("a part of the scores is changed before it is added to the others")
            biases = [replace(each, factor=each.factor * step.factor) for each in biases]
        elif isinstance(step, Bias):
            biases.append(step)
        elif not isinstance(step, Cast):
            raise Declined("a part of the scores is changed before it is added to the others")
    first = found.contraction
    sides = [
        _Side(node, resolved(its))
        for node, its in ((first.left, first.left_dims), (first.right, first.right_dims))
    ]
    if len(dims) - 1 in sides[0].places(dims):
        sides.reverse()
    factors = [each for each in factors if each[0] != 1.0]
    return _Part(
        *(sides[0], sides[1], dims, resolve((first.contracted,))),
        *(tuple(factors), tuple(biases)),
    )


def _separable(parts: Sequence[_Part]) -> bool:
    """Whether all products are of the same rows and columns."""
    last = len(parts[0].dims) - 1
    return bool(_rows(parts)) and not any(last in p.rows.places(p.dims) for p in parts)


def _row(parts: Sequence[_Part]) -> int:
    """The dim of the scores that is the row of one product, as the last is its column."""
    return _rows(parts)[-1]


def _rows(parts: Sequence[_Part]) -> list[int]:
    wide = set().union(*(part.columns.places(part.dims) for part in parts))
    return [d for d in range(len(parts[0].dims) - 1) if d not in wide]


def _batched(part: _Part) -> int:
    """Along how many dims there is a product for each place."""
    return len(part.rows.places(part.dims) & part.columns.places(part.dims))


def _added(gm: GraphModule, total: Node, parts: Sequence[_Part]) -> Joined:
    """The sum with the product that is none of a row with a column (of a query with the position of
    a key relative to it, say) as a tensor that is added.
    """
    alone = [n for n, part in enumerate(parts) if _separable([part])]
    if not alone or contraction.read(total) is not None:
        raise Declined("the scores are a sum of products over other rows and columns")
    kept = max(alone, key=lambda n: _batched(parts[n]))
    sides = list(total.args[:2])
    # the same tensor, but no scores to who reads them
    sides[1 - kept] = edit.call(gm, aten.positive.default, (sides[1 - kept],), {}, near=total)
    before = total.args
    edit.respell(total, total.target, (*sides, *before[2:]), dict(total.kwargs))
    return Joined(total, before, total)


def _check_place(gm: GraphModule, total: Node, nodes: Sequence[Node]) -> None:
    """Raise `Declined` where the products cannot be computed where the sum is."""
    regions = view.regions(gm)
    if any(regions.get(node) != regions.get(total) for node in nodes):
        raise Declined("grad mode or autocast changes between the parts of the scores")
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    first, last = min(order[node] for node in nodes), order[total]
    between = list(gm.graph.nodes)[first:last]
    if any(view.mutates(node) for node in between):
        raise Declined("something is written between the parts of the scores")


def _check_price(total: Node, parts: Sequence[_Part], row: int) -> None:
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


def _kept(parts: Sequence[_Part], sides: Sequence[_Side], place: int) -> list[int]:
    """The dims of the scores that some operand on a side has, and that of its own last."""
    own = [side.places(part.dims) for part, side in zip(parts, sides, strict=True)]
    return [*sorted(set().union(*own) - {place}), place]


def _together(
    arranger: Arranger, parts: Sequence[_Part], sides: Sequence[_Side], place: int
) -> Node:
    """The operands side by side along the width, with the dims of the scores that any has."""
    kept = _kept(parts, sides, place)
    rank = len(parts[0].dims)
    other = _row(parts) if place == rank - 1 else rank - 1
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
