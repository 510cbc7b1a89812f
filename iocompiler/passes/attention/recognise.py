"""From a contraction (or a call of scaled_dot_product_attention) back to the attention it ends, if it ends one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.passes.attention import contraction, rows, scores, views
from iocompiler.passes.attention.axes import Axis, Dims, broadcast, flat, fresh, known, resolve, resolved
from iocompiler.passes.attention.contraction import Contraction
from iocompiler.passes.attention.description import Attention, Bias, Causal, Declined, Fill, Operand, Scale, Step
from iocompiler.passes.attention.rows import Softmax
from iocompiler.passes.attention.scores import Scores

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
_CONVERT = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)
_NEAR = 4  # this far before a contraction a softmax is looked for to name what is in the way


@dataclass(frozen=True)
class _Probabilities:
    """What is contracted with the values: a softmax, then views, casts and dropout (in the graph's order)."""

    softmax: Softmax
    path: tuple[Node, ...]
    dropout_p: float


def recognise(node: Node) -> Attention | None:
    """The attention whose output ``node`` computes; None where it is nothing like one.

    Raises:
        Declined: it is nearly one.
    """
    if node.target is SDPA:
        return _library_call(node)
    second = contraction.read(node)
    if second is None:
        return None
    for side, other in (("left", "right"), ("right", "left")):
        found = _probabilities(second.operand(side)[0])
        if found is not None:
            return _attention(second, second.operand(side), second.operand(other), found)
    return None


def _probabilities(node: Node) -> _Probabilities | None:
    path: list[Node] = []
    dropout_p = 0.0
    while True:
        softmax = rows.read(node) or rows.late(node)
        if softmax is not None:
            return _Probabilities(softmax, tuple(reversed(path)), dropout_p)
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
            return None
        if node.target is aten.dropout.default:
            p, train = float(node.args[1]), bool(node.args[2])  # type: ignore[arg-type]
            if train and p and dropout_p:
                raise Declined("dropout twice")
            dropout_p = p if train and p else dropout_p
        elif node.target not in (*views.VIEWS, *_CONVERT):
            if _softmax_near(node):
                raise Declined(f"{node.target} between the softmax and the second contraction")
            return None
        path.append(node)
        node = node.args[0]


def _softmax_near(node: Node, far: int = _NEAR) -> bool:
    if rows.read(node) is not None:
        return _from_scores(rows.read(node))
    if node.op != "call_function" or far == 0 or contraction.read(node) is not None:
        return False
    return any(_softmax_near(read, far - 1) for read in node.all_input_nodes)


def _from_scores(softmax: Softmax | None) -> bool:
    try:
        return softmax is not None and scores.read(softmax.scores) is not None
    except Declined:
        return True


def _attention(
    second: Contraction, weights: tuple[Node, Dims], value: tuple[Node, Dims], found: _Probabilities
) -> Attention | None:
    program = scores.read(found.softmax.scores)
    if program is None:
        if _softmax_near(found.softmax.scores):
            raise Declined("a softmax of a softmax")
        return None
    first, dims = program.contraction, resolved(program.dims)
    column = _column(dims, found.softmax.dim)
    query, key = _query_and_key(first, column)
    _join(weights[1], _along(found.path, dims))
    if resolve((second.contracted,)) != (column,):
        raise Declined("the values are not summed over the softmax's dim")
    anchor, late = _end(second.node, found.softmax)
    output = resolved(second.dims)
    if late and (found.softmax.dim != len(dims) - 1 or output[:-1] != dims[:-1]):
        raise Declined("the sums of the powers do not go with the rows of the output")
    interior = {*program.nodes, *found.softmax.nodes, *found.path, second.node, *late}
    made = _described(query, key, value, output, column, first.contracted, weights)
    return replace(
        made,
        steps=program.steps,
        dropout_p=found.dropout_p,
        dtype=views.dtype(second.node),
        anchor=anchor,
        interior=frozenset(interior),
    )


def _column(dims: Dims, dim: int) -> Axis:
    group = dims[dim]
    if len(group) != 1:
        raise Declined("the softmax is over no single axis of the scores")
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
    """The node that computes the output, and what else then falls away: with a late division, the division."""
    if softmax.total is None or softmax.total in softmax.nodes[:-1]:
        return node, ()
    for user in node.users:
        if user.target is aten.div.Tensor and user.args == (node, softmax.total) and not user.kwargs:
            if len(views.shape(user)) == len(views.shape(softmax.total)):
                return user, (user,)
    raise Declined("the powers of the scores are not divided by their sums")


def _described(
    query: tuple[Node, Dims],
    key: tuple[Node, Dims],
    value: tuple[Node, Dims],
    output: Dims,
    column: Axis,
    width: Axis,
    weights: tuple[Node, Dims] | None,
) -> Attention:
    """The operands in common axes; ``output`` are the dims of the result."""
    operands = [Operand(tuple(views.stages(*each))) for each in (query, key, value)]
    of_query, of_key, of_value = (flat(operand.dims) for operand in operands)
    column_axes, width_axes = resolve((column,)), resolve((width,))
    if len(column_axes) != 1 or len(width_axes) != 1:
        raise Declined("the keys or the head width are spread over several dims")
    row_axes = flat(output[:-1]) if weights is None else flat(weights[1])
    rows_ = tuple(axis for axis in row_axes if axis is not column_axes[0])
    new = [axis for axis in flat(output) if axis not in rows_]
    if len(new) > 1 or any(axis in rows_ for axis in new):
        raise Declined("the output's width is spread over several dims")
    value_width = new[0] if new else Axis(1)
    allowed = ({*rows_, *width_axes}, {*rows_, *column_axes, *width_axes}, {*rows_, *column_axes, value_width})
    for name, axes, may in zip(("query", "key", "value"), (of_query, of_key, of_value), allowed, strict=True):
        if not set(axes) <= may:
            raise Declined(f"the {name} has a dim the others have not")
    candidates = [axis for axis in rows_ if axis not in of_key and axis not in of_value and axis in of_query]
    row = candidates[-1] if candidates else None
    return Attention(
        *operands, row, column_axes[0], width_axes[0], value_width, rows_, (), 0.0, torch.float32,
        query[0], output, frozenset(),
    )  # fmt: skip


def _library_call(node: Node) -> Attention:
    arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
    arguments |= node.kwargs
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    shapes = [views.shape(each) for each in (query, key, value)]
    if len({len(shape) for shape in shapes}) != 1 or len(shapes[0]) < 3:
        raise Declined("query, key and value of different ranks, or with no batch")
    batch = fresh(views.shape(node)[:-2])
    row, column, width, value_width = (Axis(n) for n in (shapes[0][-2], *shapes[1][-2:], shapes[2][-1]))
    grouped = bool(arguments.get("enable_gqa", False))
    leading = [_leading(batch, shape[:-2], grouped) for shape in shapes]
    if known(width.size == 1):
        raise Declined("a head width of one")
    dims: list[Dims] = [
        (*lead, *ends)
        for lead, ends in zip(leading, (((row,), (width,)), ((column,), (width,)), ((column,), (value_width,))), strict=True)
    ]
    output: Dims = (*batch, (row,), (value_width,))
    scale = arguments.get("scale")
    steps: list[Step] = [Scale(float(shapes[0][-1]) ** -0.5 if scale is None else scale)]
    mask = arguments.get("attn_mask")
    if isinstance(mask, Node):
        steps.append(_library_mask(mask, (*batch, (row,), (column,))))
    if arguments.get("is_causal", False):
        steps.append(Causal())
    made = _described((query, dims[0]), (key, dims[1]), (value, dims[2]), resolved(output), column, width, None)
    return replace(
        made, row=(resolve((row,)) or (None,))[0], steps=tuple(steps), anchor=node, interior=frozenset({node}),
        dropout_p=float(arguments.get("dropout_p", 0.0)), dtype=views.dtype(node), library=True,
    )  # fmt: skip


def _leading(batch: Dims, shape: Any, grouped: bool) -> Dims:
    found = broadcast(batch, shape)
    if found is not None:
        return found
    heads, groups = batch[-1][0], shape[-1]
    if grouped and isinstance(heads.size, int) and isinstance(groups, int) and heads.size % groups == 0:
        outer, _ = heads.split(groups) if heads.parts is None else heads.parts
        lead = broadcast(batch[:-1], shape[:-1])
        if lead is not None and outer.size == groups:
            return (*lead, (outer,) if groups != 1 else ())
    raise Declined("query, key and value of batches that do not go together")


def _library_mask(mask: Node, dims: Dims) -> Bias | Fill:
    against = broadcast(dims, views.shape(mask))
    if against is None:
        raise Declined("the mask does not fit the scores")
    if views.dtype(mask) == torch.bool:
        return Fill(mask, against, float("-inf"), keep=True)
    return Bias(mask, against)


def interior_is_private(found: Attention) -> str:
    """Why the nodes in between must be kept, or ""."""
    for node in found.interior - {found.anchor}:
        strangers = [user for user in node.users if user not in found.interior]
        if strangers:
            kind = "returned" if any(user.op == "output" for user in strangers) else "used"
            return f"{view.where(node) or node.name}: {node.name} is {kind} elsewhere"
    return ""
