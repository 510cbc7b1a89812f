"""From a contraction (or a call of scaled_dot_product_attention) back to the attention it ends, if
it ends one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import Axis, Dims, broadcast, flat, resolve, resolved
from iocompiler.passes.attention.reading import (
    contraction,
    library,
    near,
    powers,
    results,
    rows,
    scores,
    weights,
)
from iocompiler.passes.attention.reading.assemble import assemble
from iocompiler.passes.attention.reading.constants import number
from iocompiler.passes.attention.reading.contraction import Contraction
from iocompiler.passes.attention.reading.description import Apart, Attention, Beside, Declined
from iocompiler.passes.attention.reading.rows import Softmax
from iocompiler.passes.attention.reading.scores import Scores
from iocompiler.passes.attention.reading.weights import Weights

aten = torch.ops.aten
_SIDES = ("left", "right")


@dataclass(frozen=True)
class _Probabilities:
    """What is contracted with the values: a softmax, then views, casts and dropout (in the graph's
    order).
    """

    softmax: Softmax
    path: tuple[Node, ...]
    dropout_p: float


def recognise(node: Node) -> Attention | None:
    """The attention whose output ``node`` computes; None where it is nothing like one.

    Raises:
        Declined: it is nearly one.
    """
    if node.target is library.TARGET:
        return library.read(node)
    second = contraction.read(node)
    if second is None:
        return None
    sides = [(second.operand(a), second.operand(b)) for a, b in (_SIDES, _SIDES[::-1])]
    for of_weights, value in sides:
        found = _probabilities(of_weights[0])
        if found is not None:
            _check_plain(second)
            return _attention(second, of_weights, value, found)
    for of_weights, value in sides:
        made = weights.read(of_weights[0], second, value)
        if made is not None:
            _check_plain(second)
            return _weighted(second, of_weights, value, made)
    return None


def _check_plain(second: Contraction) -> None:
    if second.added is not None or second.alpha != 1.0:
        raise Declined("the product with the values is scaled, or added to another tensor")


def _probabilities(node: Node) -> _Probabilities | None:
    path: list[Node] = []
    dropout_p = 0.0
    while True:
        softmax = rows.read(node) or rows.late(node) or rows.without_sink(node)
        if softmax is not None:
            return _Probabilities(softmax, tuple(reversed(path)), dropout_p)
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
            return None
        if node.target is aten.dropout.default:
            p, train = number(node.args[1]), bool(node.args[2])
            if p is None:
                raise Declined("a dropout known only at run time")
            if train and p and dropout_p:
                raise Declined("dropout twice")
            dropout_p = p if train and p else dropout_p
        elif node.target not in (*views.VIEWS, *views.CASTS):
            near.check_between(node)
            return None
        path.append(node)
        node = node.args[0]


def _attention(
    second: Contraction,
    of_weights: tuple[Node, Dims],
    value: tuple[Node, Dims],
    found: _Probabilities,
) -> Attention | None:
    program = scores.read(found.softmax.scores)
    if program is None:
        near.check_unread(found.softmax.scores)
        return None
    dims = resolved(program.dims)
    column = _column(dims, found.softmax)
    _join(of_weights[1], _along(found.path, dims))
    if resolve((second.contracted,)) != (column,):
        raise Declined("the values are not summed over the softmax's dim")
    anchor, late = _end(second.node, found.softmax)
    output = resolved(second.dims)
    if late and (found.softmax.dim != len(dims) - 1 or output[:-1] != dims[:-1]):
        raise Declined("the sums of the powers do not go with the rows of the output")
    interior = {*program.nodes, *found.softmax.nodes, *found.path, second.node, *late}
    sums = results.row_sums(found.softmax, program, interior)
    interior.update(*(each.nodes for each in sums))
    return Attention(
        **_operands(program, column, of_weights, value, output),
        dims=output,
        steps=program.steps,
        dropout_p=found.dropout_p,
        dtype=views.dtype(second.node),
        anchor=anchor,
        interior=frozenset(interior),
        sink=_beside(found.softmax, dims),
        row_sums=tuple(each.described for each in sums),
        probabilities=() if late else (found.softmax.node, *found.path),
    )


def _weighted(
    second: Contraction, of_weights: tuple[Node, Dims], value: tuple[Node, Dims], made: Weights
) -> Attention:
    """The attention whose weights are a function of each score."""
    dims = resolved(made.program.dims)
    _join(of_weights[1], _along(made.path, dims))
    column = resolve((second.contracted,))
    if len(column) != 1 or column not in resolved(made.program.dims):
        raise Declined("the values are summed over no dim of the scores")
    return Attention(
        **_operands(made.program, column[0], of_weights, value, resolved(second.dims)),
        dims=resolved(second.dims),
        steps=made.program.steps,
        dropout_p=0.0,
        dtype=views.dtype(second.node),
        anchor=second.node,
        interior=frozenset({*made.program.nodes, *made.path, second.node}),
        weights=made.name,
        probabilities=(made.program.nodes[-1], *made.path),
    )


def _operands(
    program: Scores,
    column: Axis,
    of_weights: tuple[Node, Dims],
    value: tuple[Node, Dims],
    output: Dims,
) -> dict[str, Any]:
    """The fields of `Attention` that say what its operands are."""
    first, dims = program.contraction, resolved(program.dims)
    query, key = _query_and_key(first, column)
    shared = set(flat(query[1])) & set(flat(key[1])) - set(resolve((first.contracted,)))
    if not shared and near.are_scores(key[0]):
        raise Declined("the heads of the scores are mixed before they weigh the values")
    operands = assemble(query, key, value, output, of_weights[1], column, first.contracted)
    row = operands.row
    if dims[-1] == (column,) and len(dims) > 2 and not dims[-2]:
        row = None  # one query: what else the keys lack are the heads of a group
    return {**vars(operands), "row": row}


def _beside(softmax: Softmax, dims: Dims) -> Beside | None:
    if softmax.sink is None:
        return None
    of = softmax.sink.of
    if isinstance(of, float):
        return Beside(of, (), softmax.sink.guards)
    its = broadcast((*dims[: softmax.dim], (), *dims[softmax.dim + 1 :]), views.shape(of))
    if its is None:
        raise Declined("what is beside the scores is no number of each row")
    return Beside(of, its, softmax.sink.guards)


def _column(dims: Dims, softmax: Softmax) -> Axis:
    group = dims[softmax.dim]
    if len(group) != 1:
        raise Apart(softmax.scores)
    return group[0]


def _query_and_key(first: Contraction, column: Axis) -> tuple[tuple[Node, Dims], tuple[Node, Dims]]:
    left, right = (column in flat(dims) for dims in (first.left_dims, first.right_dims))
    if left == right:
        raise Declined("the softmax is over a batch dim of the scores")
    if left:
        return (first.right, first.right_dims), (first.left, first.left_dims)
    return (first.left, first.left_dims), (first.right, first.right_dims)


def _along(path: tuple[Node, ...], dims: Dims) -> Dims:
    for node in path:
        if node.target in views.VIEWS:
            moved = views.after(node, dims)
            if moved is None:
                raise Declined(f"{node.target} on the probabilities is no view that is understood")
            dims = resolved(moved)
    return dims


def _join(its: Dims, dims: Dims) -> None:
    """Let the second contraction's axes of the probabilities be the axes of the scores."""
    for group, meaning in zip(its, dims, strict=True):
        axes = resolve(group)
        if len(axes) > 1 or (not axes and meaning):
            raise Declined("the probabilities are broadcast")
        if axes and axes != meaning:
            axes[0].parts = meaning


def _end(node: Node, softmax: Softmax) -> tuple[Node, tuple[Node, ...]]:
    """The node that computes the output, and what else then falls away: with a late division, the
    division.
    """
    if softmax.total is None or softmax.total in softmax.nodes[:-1]:
        return node, ()
    for user in node.users:
        top, bottom, between = powers.quotient(user) or (None, None, ())
        same_rank = len(views.shape(node)) == len(views.shape(softmax.total))
        if top is node and bottom is softmax.total and same_rank:
            return user, (*between, user)
    raise Declined("the powers of the scores are not divided by their sums")
