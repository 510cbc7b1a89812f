"""The products that scores are a sum of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import view
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import Dims, Group, flat, resolve, resolved
from iocompiler.passes.attention.reading import contraction, scores
from iocompiler.passes.attention.reading.description import Bias, Cast, Declined, Inverse, Scale
from iocompiler.passes.attention.reading.scores import Scores

aten = torch.ops.aten


@dataclass(frozen=True)
class Side:
    """The operand of one product that has the rows (or the columns) of the scores."""

    node: Node
    dims: Dims

    def places(self, dims: Dims) -> set[int]:
        """The dims of the scores that it has."""
        own = set(flat(self.dims))
        return {d for d, group in enumerate(dims) if own & set(group)}


@dataclass(frozen=True)
class Part:
    """One product of the sum: its operands, the dims of the scores in its axes, the axes it is
    contracted over, what it is multiplied by (and whether that divides), what is added to it.
    """

    rows: Side
    columns: Side
    dims: Dims
    over: Group
    factors: tuple[tuple[Any, bool], ...]
    biases: tuple[Bias, ...]


def read(gm: GraphModule, total: Node) -> list[Part]:
    """The two products that ``total`` is a sum of.

    Raises:
        Declined: they cannot be computed where the sum is, or are changed before they are added.
    """
    return [_part(gm, total, *term) for term in _terms(total)]


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


def _part(gm: GraphModule, total: Node, found: Scores, factor: float) -> Part:
    dims = resolved(found.dims)
    check_place(gm, total, found.nodes)
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
        Side(node, resolved(its))
        for node, its in ((first.left, first.left_dims), (first.right, first.right_dims))
    ]
    if len(dims) - 1 in sides[0].places(dims):
        sides.reverse()
    factors = [each for each in factors if each[0] != 1.0]
    return Part(
        *(sides[0], sides[1], dims, resolve((first.contracted,))),
        *(tuple(factors), tuple(biases)),
    )


def separable(parts: Sequence[Part]) -> bool:
    """Whether all products are of the same rows and columns."""
    last = len(parts[0].dims) - 1
    return bool(_rows(parts)) and not any(last in p.rows.places(p.dims) for p in parts)


def row_of(parts: Sequence[Part]) -> int:
    """The dim of the scores that is the row of one product, as the last is its column."""
    return _rows(parts)[-1]


def _rows(parts: Sequence[Part]) -> list[int]:
    wide = set().union(*(part.columns.places(part.dims) for part in parts))
    return [d for d in range(len(parts[0].dims) - 1) if d not in wide]


def batched(part: Part) -> int:
    """Along how many dims there is a product for each place."""
    return len(part.rows.places(part.dims) & part.columns.places(part.dims))


def check_place(gm: GraphModule, total: Node, nodes: Sequence[Node]) -> None:
    """Raise `Declined` where the products cannot be computed where the sum is."""
    regions = view.regions(gm)
    if any(regions.get(node) != regions.get(total) for node in nodes):
        raise Declined("grad mode or autocast changes between the parts of the scores")
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    first, last = min(order[node] for node in nodes), order[total]
    between = list(gm.graph.nodes)[first:last]
    if any(view.mutates(node) for node in between):
        raise Declined("something is written between the parts of the scores")
