"""Tensors that differ from score to score only by how far a key is from its query: T5's buckets of
distances, say. They are computed once for each distance.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import sympy
import torch
from torch.fx import Node
from torch.fx.node import map_arg

from iocompiler.graph import view
from iocompiler.graph.sizes import known
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.arrange import Arranger
from iocompiler.passes.attention.dims.axes import Axis, expression
from iocompiler.passes.attention.masks.evaluate import Evaluator
from iocompiler.passes.attention.masks.places import At, aligned
from iocompiler.passes.attention.masks.values import Index

aten = torch.ops.aten
_MOVES = (
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.to.dtype,
    aten.to.device,
    aten._to_copy.default,
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
)
_FEWEST = 3  # operators in between, or it is as well computed in the kernel


@dataclass(frozen=True)
class Distances:
    """``node``, computed from distances: its dims are a head dim, the row's and the column's.

    Attributes:
        node: the tensor.
        root: the distances it is computed from, key minus query times ``sign`` plus ``offset``.
        head: the dim of the heads, None where it has none; keys: that of the column.
    """

    node: Node
    root: Node
    sign: int
    offset: int
    row: Axis
    column: Axis
    head: int | None
    keys: int

    def emit(self, arranger: Arranger) -> Node:
        """[H or 1, S + K - 1] for the distances from 1 - S to K - 1, as nodes of the graph."""
        rows, columns = (arranger.size((axis,)) for axis in (self.row, self.column))
        low = arranger.call(operator.sub, 1, rows) if isinstance(rows, Node) else 1 - rows
        value = view.value(self.root)
        apart = arranger.call(aten.arange.start, low, columns, device=value.device)
        if self.sign < 0:
            apart = arranger.call(aten.neg.default, apart)
        if self.offset:
            apart = arranger.call(aten.add.Tensor, apart, self.offset)
        if value.dtype != views.dtype(apart):
            apart = arranger.call(aten.to.dtype, apart, value.dtype)
        for _ in range(value.dim() - 1):
            apart = arranger.call(aten.unsqueeze.default, apart, 0)
        made: dict[Node, Node] = {self.root: apart}
        found = self._copy(arranger, self.node, made)
        rank = len(views.shape(found))
        order = [d for d in (self.head, self.keys) if d is not None]
        ones = [d for d in range(rank) if d not in order]
        found = arranger.call(aten.permute.default, found, [*ones, *order])
        for _ in ones:
            found = arranger.call(aten.select.int, found, 0, 0)
        if self.head is None:
            return arranger.call(aten.unsqueeze.default, found, 0)
        # neighbouring distances are read together
        return arranger.call(aten.contiguous.default, found)

    def _copy(self, arranger: Arranger, node: Node, made: dict[Node, Node]) -> Node:
        if node not in made:
            behind = {each for each in node.all_input_nodes if _reaches(each, self.root)}
            args, kwargs = map_arg(
                (node.args, node.kwargs),
                lambda each: self._copy(arranger, each, made) if each in behind else each,
            )
            made[node] = arranger.call(node.target, *args, **kwargs)
        return made[node]


def by_distance(
    node: Node,
    at: At,
    row: Axis | None,
    column: Axis,
    evaluator: Evaluator,
) -> Distances | None:
    """The tensor as one of distances; None where it is none."""
    if row is None or not views.is_tensor(node):
        return None
    places = {axis: at.index(axis.index) for axis in (row, column) if axis.index in at}
    others = [d for d, x in enumerate(at) if d not in places.values() and x != 0]
    if len(places) < 2 or len(others) > 1:
        return None
    symbols = {axis.index for axis in (row, column)}
    if any(at[d].free_symbols & symbols for d in others):
        return None
    root = _root(node, evaluator, 0)
    if root is None:
        return None
    found, steps = root
    affine = _affine(found, evaluator)
    if affine is None or steps < _FEWEST:
        return None
    sizes = zip((row, column), views.shape(found)[-2:], strict=True)
    if not all(known(axis.size == n) for axis, n in sizes):
        return None
    return Distances(
        node, found, *affine, row, column, others[0] if others else None, places[column]
    )


def _root(node: Node, evaluator: Evaluator, steps: int) -> tuple[Node, int] | None:
    """The tensor of distances that everything behind ``node`` is computed from, and how many
    operators away it is.
    """
    if evaluator.is_written(node):
        return None
    if _affine(node, evaluator) is not None:
        return node, steps
    pointwise = isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in node.target.tags or node.target in _MOVES
    )
    if node.op != "call_function" or not (pointwise or node.target is aten.embedding.default):
        return None
    found: tuple[Node, int] | None = None
    for each in node.all_input_nodes:
        if node.target is aten.embedding.default and each is node.args[0]:
            continue  # the table itself
        if not views.is_tensor(each) or views.is_single(each):
            continue
        behind = _root(each, evaluator, steps + 1)
        if behind is None or (found is not None and found[0] is not behind[0]):
            return None
        found = behind if found is None or behind[1] > found[1] else found
    return found


def _affine(node: Node, evaluator: Evaluator) -> tuple[int, int] | None:
    """(sign, offset) of a matrix of key minus query, times the sign, plus the offset."""
    value = view.value(node)
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.dtype == torch.bool:
        return None
    names = [sympy.Dummy("x", integer=True, nonnegative=True) for _ in range(value.dim())]
    at = aligned(value.shape, tuple(names))
    extents = {x: expression(n) for x, n in zip(names, value.shape, strict=True)}
    found = evaluator.element(node, at, extents)
    if not isinstance(found, Index):
        return None
    for sign in (1, -1):
        rest = sympy.expand(found.expr - sign * (names[-1] - names[-2]))
        if rest.is_Integer:
            return sign, int(rest)
    return None


def _reaches(node: Node, root: Node) -> bool:
    return node is root or any(_reaches(each, root) for each in node.all_input_nodes)
