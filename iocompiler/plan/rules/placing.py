"""Operators that put elements in places that are read, of a new tensor or of an old one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from iocompiler.plan.lowering import Lowering, Rule, Unsupported
from iocompiler.plan.rules.arithmetic import result_dtype
from iocompiler.plan.rules.indexing import block_of, indirect, picked, tensor_of
from iocompiler.plan.sizes import equal
from iocompiler.plan.views import Index, dim_argument, shape_of
from iocompiler.tile.index import Affine, Size

aten = torch.ops.aten

_FEW_PLACES = 2
"""Written by index: every element of the result is compared with each of them."""


def _index_copy(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """``base`` with a few places along one dimension replaced, the last of equal ones kept."""
    if not index:
        raise Unsupported("index_copy of a number")
    dim, ids = dim_argument(node, 1, len(index)), tensor_of(node.args[2])
    return _replaced(low, node, (dim, ids, tensor_of(node.args[3])), index, mask, wrap=False)


def _index_put(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """As `_index_copy`, of one index tensor."""
    base, listed = tensor_of(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    values = tensor_of(node.args[2])
    _check_values(base, listed, values, node.args[3:])
    given = [(dim, ids) for dim, ids in enumerate(listed) if ids is not None]
    if len(given) > 1:
        raise Unsupported("places by several index tensors")
    return _replaced(low, node, (*given[0], values), index, mask, wrap=True)


def _replaced(
    low: Lowering,
    node: Node,
    written: tuple[int, Node, Node],
    index: Index,
    mask: int | None,
    wrap: bool,
) -> int:
    """An element of the first argument, or what is written there: dimension, places, values."""
    dim, ids, values = written
    count = ids.meta["val"].numel()
    if ids.meta["val"].dim() != 1 or not isinstance(count, int) or count > _FEW_PLACES:
        raise Unsupported("many places are written, by index")
    dtype = result_dtype(node)
    base = tensor_of(node.args[0])
    found = low.convert(low.value(base, index, mask), dtype)
    for number in range(count):
        each = Affine.constant(number)
        place = indirect(low, ids, (each,), None, shape_of(base)[dim], wrap=wrap).values[0]
        here = low.builder.map("eq", low.builder.iota(index[dim]), place, dtype=torch.bool)
        at = index[:dim] + (each,) + index[dim + 1 :]
        new = low.convert(low.value(values, at, low.both(mask, here)), dtype)
        found = low.builder.map("where", here, new, found, dtype=dtype)
    return found


def place_written(low: Lowering, node: Node, index: Index) -> tuple[Index, int | None]:
    """Where in its first argument a call that writes in part stores the element at ``index`` of
    what it writes, and whether that is there: elements that lie outside are not stored, where eager
    stops the program.
    """
    base = tensor_of(node.args[0])
    if node.target is aten.index_copy_.default:
        ids = tensor_of(node.args[2])
        if not index or ids.meta["val"].dim() != 1 or len(index) != len(shape_of(base)):
            raise Unsupported("index_copy_ of numbers")
        dim = dim_argument(node, 1, len(index))
        at = indirect(low, ids, (index[dim],), None, shape_of(base)[dim], wrap=False)
        place = index[:dim] + (at,) + index[dim + 1 :]
    elif node.target is aten.index_put_.default:
        _check_values(base, node.args[1], tensor_of(node.args[2]), node.args[3:])
        place = picked(low, base, node.args[1], index, None)
    else:
        raise Unsupported(f"no rule for {node.target}")
    inside: int | None = None
    for position, size in zip(place, shape_of(base), strict=True):
        for value in position.values:
            inside = low.both(inside, _within(low, value, size))
    return place, inside


def _check_values(base: Node, listed: Any, values: Node, accumulate: Sequence[Any]) -> None:
    """Raise `Unsupported` where the values are added, or are not as many as the places."""
    if any(accumulate):
        raise Unsupported("index_put_ that adds")
    dims = [d for d, ids in enumerate(listed) if ids is not None]
    if not dims:
        raise Unsupported("index_put_ of everything")
    block = block_of([tensor_of(listed[d]) for d in dims])
    sizes = shape_of(base)
    start = dims[0] if dims == list(range(dims[0], dims[0] + len(dims))) else 0
    rest = [size for d, size in enumerate(sizes) if d not in dims]
    places, given = [*rest[:start], *block, *rest[start:]], shape_of(values)
    if len(given) != len(places) or not all(map(equal, given, places)):
        raise Unsupported("index_put_ of values that are repeated")


def _within(low: Lowering, value: int, size: Size) -> int:
    build = low.builder
    limits = build.const(0, torch.int64), build.const(size, torch.int64)
    above = build.map("ge", value, limits[0], dtype=torch.bool)
    return low.both(above, build.map("lt", value, limits[1], dtype=torch.bool))


def _written_in_part(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    raise Unsupported(node, " is written into an input, of which it is a part")


PLACING: dict[Any, Rule] = {
    aten.index_copy.default: _index_copy,
    aten.index_put.default: _index_put,
    aten.index_copy_.default: _written_in_part,
    aten.index_put_.default: _written_in_part,
}
