"""Operators that move elements: gathers, concatenation, padding, functions of the index alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from iocompiler.plan.lowering import Lowering, Rule, Unsupported, literal
from iocompiler.plan.rules.arithmetic import result_dtype
from iocompiler.plan.sizes import bounds, nonnegative, normal, size_of
from iocompiler.plan.views import (
    Index,
    argument,
    broadcast_index,
    dim_argument,
    dims_argument,
    flatten,
    shape_of,
    slice_start,
)
from iocompiler.tile.index import Affine, Size

aten = torch.ops.aten


def tensor_of(arg: Any) -> Node:
    assert isinstance(arg, Node)
    return arg


def indirect(
    low: Lowering, ids: Node, index: Index, mask: int | None, size: Size, wrap: bool = True
) -> Affine:
    """The integer at ``index`` of ``ids`` as an index term; a negative one counts from the end."""
    if ids.meta["val"].dtype not in (torch.int64, torch.int32):
        raise Unsupported(f"indices of dtype {ids.meta['val'].dtype}")
    build = low.builder
    value = low.convert(low.value(ids, index, mask), torch.int64)
    if wrap:
        zero = build.const(0, torch.int64)
        wrapped = build.map("add", value, build.const(size, torch.int64))
        value = build.map("where", build.map("lt", value, zero, dtype=torch.bool), wrapped, value)
    return Affine.of(f"%{value}")


def _embedding(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    weight, ids = tensor_of(node.args[0]), tensor_of(node.args[1])
    row = indirect(low, ids, index[:-1], mask, shape_of(weight)[0], wrap=False)
    return low.value(weight, (row, index[-1]), mask)


def _index_select(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    source, ids = tensor_of(node.args[0]), tensor_of(node.args[2])
    if not shape_of(source):
        return low.value(source, (), mask)  # the one element there is
    dim = dim_argument(node, 1, len(index))
    at = (index[dim],) if ids.meta["val"].dim() else ()
    picked = indirect(low, ids, at, mask, shape_of(source)[dim], wrap=False)
    return low.value(source, index[:dim] + (picked,) + index[dim + 1 :], mask)


def _gather(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    source, ids = tensor_of(node.args[0]), tensor_of(node.args[2])
    if not shape_of(source):
        return low.value(source, (), mask)  # the one element there is
    if not index:
        raise Unsupported("gather of a 0-dim index")
    dim = dim_argument(node, 1, len(index))
    picked = indirect(low, ids, index, mask, shape_of(source)[dim], wrap=False)
    return low.value(source, index[:dim] + (picked,) + index[dim + 1 :], mask)


def _advanced_index(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """aten.index.Tensor with integer index tensors (a boolean one has no static shape)."""
    source = tensor_of(node.args[0])
    return low.value(source, picked(low, source, node.args[1], index, mask), mask)


def picked(low: Lowering, source: Node, listed: Any, index: Index, mask: int | None) -> Index:
    """Where in ``source`` the element at ``index`` of what is indexed there lies."""
    given = list(listed)
    sizes = shape_of(source)
    if any(
        ids is not None and ids.meta["val"].dtype not in (torch.int64, torch.int32) for ids in given
    ):
        raise Unsupported("an index that is a mask")
    given += [None] * (len(sizes) - len(given))
    dims = [d for d, ids in enumerate(given) if ids is not None]
    tensors = [tensor_of(given[d]) for d in dims]
    shape = block_of(tensors)
    adjacent = dims == list(range(dims[0], dims[0] + len(dims)))
    start = dims[0] if adjacent else 0
    inner = index[start : start + len(shape)]
    rest = iter(index[:start] + index[start + len(shape) :])
    found = {
        d: indirect(low, t, broadcast_index(inner, shape, shape_of(t)), mask, sizes[d])
        for d, t in zip(dims, tensors, strict=True)
    }
    return tuple(found[d] if d in found else next(rest) for d in range(len(sizes)))


def block_of(tensors: list[Node]) -> list[Size]:
    """The shape that index tensors have together."""
    shapes = [t.meta["val"].shape for t in tensors]
    return [size_of(s) for s in torch.broadcast_shapes(*shapes)]  # type: ignore[no-untyped-call]


def _choose(
    low: Lowering,
    position: Affine,
    limit: Size,
    a: Callable[[int], int],
    b: Callable[[int], int],
    mask: int | None,
    dtype: torch.dtype,
) -> int:
    """``a`` where position < limit, else ``b``; each is given the mask under which it may load."""
    first = low.below(position, limit)
    other = low.builder.map("logical_not", first, dtype=torch.bool)
    left = low.convert(a(low.both(mask, first)), dtype)
    right = low.convert(b(low.both(mask, other)), dtype)
    return low.builder.map("where", first, left, right, dtype=dtype)


def _cat(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    parts: Any = node.args[0]
    tensors = [t for t in map(tensor_of, parts) if t.meta["val"].dim() == len(index)]
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    dim = int(given) % len(index)
    return _cat_from(low, tensors, dim, index, 0, mask, result_dtype(node))


def _cat_from(
    low: Lowering,
    tensors: list[Node],
    dim: int,
    index: Index,
    start: Size,
    mask: int | None,
    dtype: torch.dtype,
) -> int:
    """Element ``index`` of concatenated ``tensors``, the first at ``start`` along ``dim``."""
    first, rest = tensors[0], tensors[1:]
    end = start + shape_of(first)[dim]

    def here(inner_mask: int | None) -> int:
        place = index[:dim] + (index[dim] - start,) + index[dim + 1 :]
        return low.convert(low.value(first, place, inner_mask), dtype)

    limits = bounds(index[dim], low.extents)
    if not rest or (limits is not None and nonnegative(normal(end - 1 - limits[1]))):
        return here(mask)
    if limits is not None and nonnegative(normal(limits[0] - end)):
        return _cat_from(low, rest, dim, index, end, mask, dtype)
    return _choose(
        low,
        index[dim],
        end,
        here,
        lambda m: _cat_from(low, rest, dim, index, end, m, dtype),
        mask,
        dtype,
    )


def _inside(low: Lowering, position: Affine, start: Size, end: Size) -> int | None:
    """The predicate start <= position < end, leaving out what always holds; None where both do."""
    limits = bounds(position, low.extents)
    found: int | None = None
    if limits is None or not nonnegative(normal(limits[0] - start)):
        found = low.at_least(position, start)
    if limits is None or not nonnegative(normal(end - 1 - limits[1])):
        found = low.both(found, low.below(position, end))
    return found


def _is_outside(low: Lowering, position: Affine, size: Size) -> bool:
    """Whether a position along an axis of this size never lies on it: nothing of it is there."""
    limits = bounds(position, low.extents)
    if limits is None:
        return False
    return nonnegative(normal(limits[0] - size)) or nonnegative(normal(-1 - limits[1]))


def _pad(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    source = tensor_of(node.args[0])
    listed: Any = node.args[1]
    pads: list[Any] = [literal(p) for p in listed]
    fill = node.args[2] if len(node.args) > 2 else node.kwargs.get("value", 0)
    sizes, dtype = shape_of(source), result_dtype(node)
    place, inside = list(index), None
    for pair in range(len(pads) // 2):
        dim = len(index) - 1 - pair
        place[dim] = index[dim] - pads[2 * pair]
        if _is_outside(low, place[dim], sizes[dim]):
            return low.builder.const(literal(fill or 0), dtype)
        test = _inside(low, place[dim], 0, sizes[dim])
        if test is not None:
            inside = low.both(inside, test)
    if inside is None:
        return low.value(source, tuple(place), mask)
    value = low.value(source, tuple(place), low.both(mask, inside))
    return low.builder.map(
        "where", inside, value, low.builder.const(literal(fill or 0), dtype), dtype=dtype
    )


def _slice_scatter(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """``base`` with a slice along one dimension replaced: (base, source, dim, start, end, step)."""
    base, source = tensor_of(node.args[0]), tensor_of(node.args[1])
    dim, start, step = slice_start(
        base, argument(node, 2, 0), argument(node, 3, None), argument(node, 5, 1)
    )
    if step != 1:
        raise Unsupported("slice_scatter with a step")
    dtype = result_dtype(node)
    place, size = index[dim] - start, shape_of(source)[dim]
    if _is_outside(low, place, size):
        return low.value(base, index, mask)
    test = _inside(low, place, 0, size)
    inner = index[:dim] + (place,) + index[dim + 1 :]
    within = mask if test is None else low.both(mask, test)
    new = low.convert(low.value(source, inner, within), dtype)
    if test is None:
        return new
    return low.builder.map("where", test, new, low.value(base, index, mask), dtype=dtype)


def _select_scatter(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    base, source = tensor_of(node.args[0]), tensor_of(node.args[1])
    dim = dim_argument(node, 2, len(index))
    at = literal(node.args[3])
    if isinstance(at, int) and at < 0:
        at = at + shape_of(base)[dim]
    dtype = result_dtype(node)
    test = low.builder.map(
        "eq", low.builder.iota(index[dim]), low.builder.const(at, torch.int64), dtype=torch.bool
    )
    new = low.convert(
        low.value(source, index[:dim] + index[dim + 1 :], low.both(mask, test)), dtype
    )
    return low.builder.map("where", test, new, low.value(base, index, mask), dtype=dtype)


def _flip(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    source = tensor_of(node.args[0])
    sizes = shape_of(source)
    dims = set(dims_argument(node, 1, len(sizes)))
    place = tuple(i * -1 + (sizes[d] - 1) if d in dims else i for d, i in enumerate(index))
    return low.value(source, place, mask)


def _repeat(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    source = tensor_of(node.args[0])
    sizes = shape_of(source)
    listed: Any = node.args[1]
    repeats = list(listed)
    extra = len(repeats) - len(sizes)
    if any(r != 1 and s != 1 for r, s in zip(repeats[extra:], sizes, strict=True)):
        raise Unsupported("repeat along a dimension longer than one")
    return low.value(source, broadcast_index(index, shape_of(node), sizes), mask)


def _triangle(lower: bool) -> Rule:
    def rule(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
        build, dtype = low.builder, result_dtype(node)
        offset = literal(node.args[1]) if len(node.args) > 1 else 0
        value = low.value(tensor_of(node.args[0]), index, mask)
        distance = build.iota(index[-1] - index[-2])
        keep = build.map(
            "le" if lower else "ge", distance, build.const(offset, torch.int64), dtype=torch.bool
        )
        return build.map("where", keep, value, build.const(0, dtype), dtype=dtype)

    return rule


def _arange(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """start + i * step (aten.arange and prims.iota)."""
    build, dtype = low.builder, result_dtype(node)
    start, step = _arange_bounds(node)
    if not dtype.is_floating_point and not isinstance(start, float) and not isinstance(step, float):
        return build.cast(build.iota(index[0] * step + start), dtype)
    position = build.cast(build.iota(index[0]), dtype)
    return build.map(
        "add", build.map("mul", position, build.const(step, dtype)), build.const(start, dtype)
    )


def _arange_bounds(node: Node) -> tuple[Any, Any]:
    if node.target is torch.ops.prims.iota.default:
        return literal(node.kwargs["start"]), literal(node.kwargs["step"])
    if node.target is aten.arange.default:
        return 0, 1
    step = literal(node.args[2]) if len(node.args) > 2 else 1
    return literal(node.args[0]), step


def _uniform(low: Lowering, node: Node, index: Index, mask: int | None) -> int:
    """iocompiler::uniform(seeds, which, shape): Philox of the flat index under seeds[which]."""
    seeds, which, _ = node.args
    assert isinstance(which, int)
    seed = low.value(tensor_of(seeds), (Affine.constant(which),), None)
    return low.builder.rand(seed, flatten(index, shape_of(node)))


INDEXING: dict[Any, Rule] = {
    aten.embedding.default: _embedding,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
    aten.index.Tensor: _advanced_index,
    aten.cat.default: _cat,
    aten.constant_pad_nd.default: _pad,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.flip.default: _flip,
    aten.repeat.default: _repeat,
    aten.tril.default: _triangle(lower=True),
    aten.triu.default: _triangle(lower=False),
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    torch.ops.prims.iota.default: _arange,
    "iocompiler.uniform.default": _uniform,
}
