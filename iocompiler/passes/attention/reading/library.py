"""Calls of scaled_dot_product_attention themselves: their explicit masks may be structure too."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.sizes import known
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import Axis, Dims, Group, broadcast, fresh, resolve
from iocompiler.passes.attention.reading.assemble import assemble
from iocompiler.passes.attention.reading.constants import number
from iocompiler.passes.attention.reading.description import (
    Attention,
    Bias,
    Causal,
    Declined,
    Fill,
    Scale,
    Step,
)

TARGET = torch.ops.aten.scaled_dot_product_attention.default


def read(node: Node) -> Attention:
    """The attention a call of scaled_dot_product_attention is.

    Raises:
        Declined: its operands are of a form that is not understood.
    """
    arguments = view.named(node)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    dropout_p = number(arguments["dropout_p"])
    if dropout_p is None:
        raise Declined("a dropout known only at run time")
    shapes = [views.shape(each) for each in (query, key, value)]
    if len({len(shape) for shape in shapes}) != 1 or len(shapes[0]) < 3:
        raise Declined("query, key and value of different ranks, or with no batch")
    batch = fresh(views.shape(node)[:-2])
    row, column, width = Axis(shapes[0][-2]), Axis(shapes[1][-2]), Axis(shapes[1][-1])
    value_width = Axis(shapes[2][-1])
    if known(width.size <= 1):
        raise Declined("a head width of zero or one")
    ends: tuple[Dims, ...] = (
        ((row,), (width,)),
        ((column,), (width,)),
        ((column,), (value_width,)),
    )
    grouped = bool(arguments["enable_gqa"])
    leading = [_leading(batch, shape[:-2], grouped) for shape in shapes]
    dims = [(*lead, *end) for lead, end in zip(leading, ends, strict=True)]
    output: Dims = (*batch, (row,), (value_width,))
    operands = assemble(
        (query, dims[0]), (key, dims[1]), (value, dims[2]), output, (*batch, (row,)), column, width
    )
    own_row = resolve((row,))
    return Attention(
        **{**vars(operands), "row": own_row[0] if own_row else None},
        steps=_steps(arguments, float(shapes[0][-1]) ** -0.5, (*batch, (row,), (column,))),
        dropout_p=dropout_p,
        dtype=views.dtype(node),
        anchor=node,
        dims=output,
        interior=frozenset({node}),
    )


def _steps(arguments: dict[str, Any], scale: float, dims: Dims) -> tuple[Step, ...]:
    steps: list[Step] = [Scale(scale if arguments["scale"] is None else arguments["scale"])]
    if isinstance(arguments["attn_mask"], Node):
        steps.append(_mask(arguments["attn_mask"], dims))
    if arguments["is_causal"]:
        steps.append(Causal())
    return tuple(steps)


def _mask(mask: Node, dims: Dims) -> Bias | Fill:
    against = broadcast(dims, views.shape(mask))
    if against is None:
        raise Declined("the mask does not fit the scores")
    if views.dtype(mask) == torch.bool:
        return Fill(mask, against, float("-inf"), keep=True)
    return Bias(mask, against)


def _leading(batch: Dims, shape: Any, grouped: bool) -> tuple[Group, ...]:
    """The batch and head dims of an operand; with groups, it may have fewer heads."""
    found = broadcast(batch, shape)
    if found is not None:
        return found
    heads, groups = batch[-1][0], shape[-1]
    static = isinstance(heads.size, int) and isinstance(groups, int)
    if grouped and static and heads.size % groups == 0:
        outer, _ = heads.split(groups) if heads.parts is None else heads.parts
        lead = broadcast(batch[:-1], shape[:-1])
        if lead is not None and outer.size == groups:
            return (*lead, (outer,))
    raise Declined("query, key and value of batches that do not go together")
