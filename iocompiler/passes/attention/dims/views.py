"""Views, followed both ways: what the dims mean after a view, and what they meant before it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.sizes import known, same_sizes
from iocompiler.passes.attention.dims.axes import (
    Axis,
    Dims,
    Group,
    flat,
    regroup,
    resolve,
    resolved,
)

aten = torch.ops.aten

COPIES = (
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.to.device,
)
"""What leaves every element as it is."""
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)
"""What leaves every element where it is, in another dtype."""

RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
)
PERMUTES = (
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.mT.default,
    aten.movedim.int,
)
_COPIES = (aten.contiguous.default, aten.clone.default, aten.alias.default)
_SQUEEZES = (aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims)
VIEWS = (
    *RESHAPES,
    *PERMUTES,
    *_COPIES,
    *_SQUEEZES,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.slice.Tensor,
)
REPEATS = (aten.repeat.default, aten.repeat_interleave.self_int)
"""What has elements of the input several times."""


def shape(node: Any) -> torch.Size:
    """The shape of the one tensor the node computes."""
    return view.tensors(node)[0].shape


def dtype(node: Node) -> torch.dtype:
    return view.tensors(node)[0].dtype


def is_tensor(value: Any) -> TypeGuard[Node]:
    """Whether an argument is a node that computes one tensor."""
    return isinstance(value, Node) and isinstance(view.value(value), torch.Tensor)


def is_single(node: Node) -> bool:
    """Whether the tensor is of one element."""
    return all(known(extent == 1) for extent in shape(node))


def after(node: Node, dims: Dims) -> Dims | None:
    """The dims of a view of a tensor with ``dims``; None where it is no view that is understood."""
    if node.target in RESHAPES:
        return regroup(dims, shape(node))
    if node.target in PERMUTES:
        return tuple(dims[d] for d in order_of(node))
    if node.target in _COPIES:
        return dims
    if node.target in _SQUEEZES:
        gone = _squeezed(node)
        return tuple(group for d, group in enumerate(dims) if d not in gone)
    if node.target is aten.unsqueeze.default:
        at = _inserted(node)
        return (*dims[:at], (), *dims[at:])
    if node.target in (aten.expand.default, aten.slice.Tensor) and _same_shape(node):
        return dims
    return None


def before(node: Node, dims: Dims) -> Dims | None:
    """The dims of the input of a view with ``dims``; an axis it repeats is missing in them."""
    source = node.args[0]
    if node.target in RESHAPES:
        return regroup(dims, shape(source))
    if node.target in PERMUTES:
        order = order_of(node)
        return tuple(dims[order.index(d)] for d in range(len(dims)))
    if node.target in _COPIES:
        return dims
    if node.target in _SQUEEZES:
        return _insert_empty(dims, _squeezed(node))
    if node.target is aten.unsqueeze.default:
        at = _inserted(node)
        return (*dims[:at], *dims[at + 1 :])
    if node.target is aten.slice.Tensor and _same_shape(node):
        return dims
    if node.target is aten.expand.default:
        extents = shape(source)
        kept = dims[len(dims) - len(extents) :]
        return tuple(() if known(n == 1) else group for n, group in zip(extents, kept, strict=True))
    if node.target is aten.repeat_interleave.self_int:
        return _before_interleave(node, dims)
    if node.target is aten.repeat.default:
        return _before_repeat(node, dims)
    return None


def _before_interleave(node: Node, dims: Dims) -> Dims | None:
    times, dim = node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if not isinstance(times, int) or not isinstance(dim, int):
        return None
    dim %= len(dims)
    parts = regroup((dims[dim],), (shape(node.args[0])[dim], times))
    return None if parts is None else (*dims[:dim], parts[0], *dims[dim + 1 :])


def _before_repeat(node: Node, dims: Dims) -> Dims | None:
    times: Any = node.args[1]
    extents = shape(node.args[0])
    if len(times) != len(extents) or not all(isinstance(n, int) for n in times):
        return None
    groups: list[Group] = []
    for group, repeat, extent in zip(dims, times, extents, strict=True):
        parts = (((), group)) if repeat == 1 else regroup((group,), (repeat, extent))
        if parts is None:
            return None
        groups.append(resolve(parts[1]))
    return tuple(groups)


def stages(node: Node, dims: Dims, whole: Collection[Axis] = ()) -> list[tuple[Node, Dims]]:
    """The tensor and what it is a view of, each with its dims: from ``node`` itself down to what
    computes it, or to where an axis that is to stay ``whole`` is split.
    """
    found = [(node, dims)]
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        if not isinstance(node.args[0].meta.get("val"), torch.Tensor):
            break
        axes = flat(dims)
        earlier = before(node, dims)
        if any(axis.parts for axis in axes if axis in whole):
            for axis in axes:
                axis.parts = None
            break
        if earlier is None:
            break
        node, dims = node.args[0], earlier
        found.append((node, dims))
    return [(each, resolved(its)) for each, its in found]


@dataclass(frozen=True)
class Operand:
    """A tensor and what it is a view of, each with its dims (see `stages`)."""

    stages: tuple[tuple[Node, Dims], ...]

    @property
    def node(self) -> Node:
        return self.stages[0][0]

    @property
    def dims(self) -> Dims:
        """The dims of what is deepest, where repeated axes are missing."""
        return self.stages[-1][1]


def order_of(node: Node) -> list[int]:
    """For each dim of the result, the dim of the input it is."""
    rank = len(shape(node.args[0]))
    order = list(range(rank))
    arguments: Any = node.args
    if node.target is aten.permute.default:
        return [d % rank for d in arguments[1]]
    if node.target is aten.movedim.int:
        start, end = (d % rank for d in arguments[1:3])
        order.insert(end, order.pop(start))
        return order
    pair = arguments[1:3] if node.target is aten.transpose.int else (rank - 2, rank - 1)
    one, other = (d % rank for d in pair)
    order[one], order[other] = order[other], order[one]
    return order


def _squeezed(node: Node) -> list[int]:
    extents = shape(node.args[0])
    if node.target is aten.squeeze.default:
        asked = list(range(len(extents)))
    else:
        given: Any = node.args[1]
        asked = [given] if isinstance(given, int) else list(given)
    return [d % len(extents) for d in asked if known(extents[d] == 1)]


def _insert_empty(dims: Dims, places: list[int]) -> Dims:
    groups = list(dims)
    for place in sorted(places):
        groups.insert(place, ())
    return tuple(groups)


def _inserted(node: Node) -> int:
    return int(node.args[1]) % len(shape(node))  # type: ignore[arg-type]


def _same_shape(node: Node) -> bool:
    return alike(node.args[0], node)


def alike(one: Any, other: Any) -> bool:
    """Whether two tensors are known to have one shape."""
    return same_sizes(shape(one), shape(other))
