"""Views as index maps: where in its input an element of a view's output lies.

A view costs no bytes and no kernel. ``input_index`` answers for the ATen view operators. Everything
stays affine: a reshape that would need a quotient asks for the axis to be split instead
(`SplitAxis`), and the kernel is lowered again over the finer axes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from iocompiler.plan.sizes import bounds, divide, equal, nonnegative, size_of, value_at
from iocompiler.tile.index import Affine, Size, product

aten = torch.ops.aten

Index = tuple[Affine, ...]

_SHAPE = "iocompiler.shape"


class NotAffine(Exception):
    """The view has no affine index map over the present axes; the node is then read from memory."""


class SplitAxis(Exception):
    """The index is affine once ``axis`` is two axes, the inner one of size ``inner``."""

    def __init__(self, axis: str, inner: Size):
        super().__init__(f"split {axis} by {inner}")
        self.axis, self.inner = axis, inner


def shape_of(node: Node) -> tuple[Size, ...]:
    value = node.meta["val"]
    known = node.meta.get(_SHAPE)
    if known is None or known[0] is not value:  # asked for in every attempt to lower the node
        known = node.meta[_SHAPE] = value, tuple(size_of(s) for s in value.shape)
    shape: tuple[Size, ...] = known[1]
    return shape


def flatten(index: Sequence[Affine], shape: Sequence[Size]) -> Affine:
    """Row-major position of ``index`` in a space of ``shape``."""
    flat, stride = Affine(), 1
    for position, size in zip(reversed(index), reversed(shape), strict=True):
        flat = flat + position * stride
        stride = stride * size
    return flat


def unflatten(flat: Affine, shape: Sequence[Size], extents: Mapping[str, Size]) -> Index:
    """The inverse of `flatten`: ``flat`` as one affine index a dimension."""
    index: list[Affine] = []
    for dim in range(len(shape)):
        inner = product(list(shape[dim + 1 :]))
        quotient, flat = _divide(flat, inner, extents)
        index.append(quotient)
    return tuple(index)


def _divide(flat: Affine, divisor: Size, extents: Mapping[str, Size]) -> tuple[Affine, Affine]:
    """flat = quotient * divisor + rest with 0 <= rest < divisor, both affine."""
    if divisor == 1:
        return flat, Affine()
    quotient: dict[str, Size] = {}
    rest: dict[str, Size] = {}
    for name, coefficient in flat.terms:
        whole = divide(coefficient, divisor)
        if whole is not None:
            quotient[name] = whole
        else:
            rest[name] = coefficient
    const = divide(flat.const, divisor)
    const_rest: Size = 0
    if const is None:
        if not (isinstance(flat.const, int) and isinstance(divisor, int)):
            raise NotAffine(f"{flat.const} by {divisor}")
        const, const_rest = divmod(flat.const, divisor)
    remainder = Affine.build(rest, const_rest)
    limits = bounds(remainder, extents)
    if limits is None:
        raise NotAffine(f"({remainder}) has no known bounds")
    if nonnegative(limits[0]) and nonnegative(divisor - 1 - limits[1]):
        return Affine.build(quotient, const), remainder
    raise _split_request(rest, divisor, extents)


def _split_request(
    rest: Mapping[str, Size], divisor: Size, extents: Mapping[str, Size]
) -> Exception:
    for name, coefficient in rest.items():
        inner = divide(divisor, coefficient)
        if inner is not None and value_at(inner, {}) < 0:
            inner = -inner  # a flipped axis splits as any other; it is a size, of one sign
        if inner is None or name not in extents or inner == 1:
            continue
        outer = divide(extents[name], inner)
        if outer is not None and outer != 1:
            return SplitAxis(name, inner)
    return NotAffine(f"no axis splits by {divisor}")


def reshape_index(
    index: Sequence[Affine],
    out_shape: Sequence[Size],
    in_shape: Sequence[Size],
    extents: Mapping[str, Size],
) -> Index:
    """Where in a tensor of ``in_shape`` element ``index`` of its reshape to ``out_shape`` lies."""
    result: list[Affine] = []
    out_dim = 0
    segments = _segments(in_shape, out_shape)
    for in_dims, out_count in segments:
        outs = list(index[out_dim : out_dim + out_count])
        sizes = list(out_shape[out_dim : out_dim + out_count])
        out_dim += out_count
        result.extend(unflatten(flatten(outs, sizes), in_dims, extents))
    return tuple(result)


def _segments(in_shape: Sequence[Size], out_shape: Sequence[Size]) -> list[tuple[list[Size], int]]:
    """Cut both shapes into runs of equal product: ([input sizes], number of output dims) each."""
    segments: list[tuple[list[Size], int]] = []
    i = j = 0
    while i < len(in_shape) or j < len(out_shape):
        ins: list[Size] = []
        outs: list[Size] = []
        while True:
            grow_in = i < len(in_shape) and (not ins or _smaller(product(ins), product(outs)))
            if grow_in or j >= len(out_shape):
                if i >= len(in_shape):
                    break
                ins.append(in_shape[i])
                i += 1
            else:
                outs.append(out_shape[j])
                j += 1
            if equal(product(ins), product(outs)) and (ins or outs):
                break
        if not equal(product(ins), product(outs)):
            raise NotAffine(f"reshape {tuple(in_shape)} -> {tuple(out_shape)}")
        # trailing ones belong to the run they follow
        while i < len(in_shape) and in_shape[i] == 1:
            ins.append(1)
            i += 1
        count = len(outs)
        while j < len(out_shape) and out_shape[j] == 1:
            count += 1
            j += 1
        segments.append((ins, count))
    return segments


def _smaller(a: Size, b: Size) -> bool:
    # only steers how the runs grow; equality is what is proved
    return value_at(a, {}, 1009) < value_at(b, {}, 1009)


def input_index(node: Node, index: Index, extents: Mapping[str, Size]) -> tuple[Node, Index]:
    """The input of a view ``node``, and the index there of the output's element at ``index``."""
    source = node.args[0]
    assert isinstance(source, Node)
    if node.target is operator.getitem:
        return _split_item(node, source, index)
    if node.target in RESHAPES:
        # straight to the first of a chain: shapes in between may split what it does not
        while source.target in RESHAPES:
            source = source.args[0]
            assert isinstance(source, Node)
    return source, VIEWS[node.target](node, source, index, extents)


def _reshape(node: Node, source: Node, index: Index, extents: Mapping[str, Size]) -> Index:
    return reshape_index(index, shape_of(node), shape_of(source), extents)


def _same(node: Node, source: Node, index: Index, extents: Mapping[str, Size]) -> Index:
    return index


def _permute(node: Node, source: Node, index: Index, extents: Mapping[str, Size]) -> Index:
    order = dims_argument(node, 1, len(index))
    return tuple(index[order.index(d)] for d in range(len(index)))


def _transpose(node: Node, source: Node, index: Index, extents: Mapping[str, Size]) -> Index:
    swapped = list(index)
    if len(index) > 1:
        a, b = dim_argument(node, 1, len(index), 0), dim_argument(node, 2, len(index), 1)
        swapped[a], swapped[b] = swapped[b], swapped[a]
    return tuple(swapped)


def _unsqueeze(node: Node, source: Node, index: Index, extents: Mapping[str, Size]) -> Index:
    dim = dim_argument(node, 1, len(index))
    return index[:dim] + index[dim + 1 :]


def _squeeze(node: Node, source: Node, index: Index, extents: Mapping[str, Size]) -> Index:
    sizes = shape_of(source)
    whole = len(node.args) < 2
    dims = set(range(len(sizes)) if whole else dims_argument(node, 1, len(sizes)))
    remaining = iter(index)
    return tuple(
        Affine() if d in dims and sizes[d] == 1 else next(remaining) for d in range(len(sizes))
    )


def _expand(node: Node, source: Node, index: Index, extents: Mapping[str, Size]) -> Index:
    return broadcast_index(index, shape_of(node), shape_of(source))


def broadcast_index(index: Index, shape: Sequence[Size], to: Sequence[Size]) -> Index:
    """Index into a tensor of shape ``to`` that broadcasts to ``shape``."""
    kept = index[len(index) - len(to) :]
    sizes = shape[len(shape) - len(to) :]
    return tuple(
        Affine() if size == 1 and not equal(full, 1) else i
        for i, size, full in zip(kept, to, sizes, strict=True)
    )


def argument(node: Node, position: int, default: Any) -> Any:
    """A positional argument; a node standing for a size is replaced by the size."""
    value = node.args[position] if len(node.args) > position else default
    if isinstance(value, Node):
        value = value.meta["val"]
    return value


def dim_argument(node: Node, position: int, rank: int, default: int = 0) -> int:
    """A dimension given at ``position``, counted from the front."""
    return int(argument(node, position, default)) % rank


def dims_argument(node: Node, position: int, rank: int) -> list[int]:
    """The dimensions given at ``position``, one or a list of them, counted from the front."""
    given: Any = node.args[position]
    listed = given if isinstance(given, (list, tuple)) else [given]
    return [int(d) % rank for d in listed] if rank else []


def slice_start(source: Node, dim: Any, start: Any, step: Any) -> tuple[int, Size, Size]:
    """(dim, start, step) of a slice of ``source``, arguments as in aten; ``start`` is resolved."""
    sizes = shape_of(source)
    dim = dim % len(sizes)
    begin = size_of(0 if start is None else start)
    if isinstance(begin, int) and begin < 0:
        begin = begin + sizes[dim]
    if isinstance(begin, int) and isinstance(sizes[dim], int):
        begin = max(0, min(begin, sizes[dim]))
    return dim, begin, size_of(step)


def _slice(node: Node, source: Node, index: Index, extents: Mapping[str, Size]) -> Index:
    dim, start, step = slice_start(
        source, argument(node, 1, 0), argument(node, 2, None), argument(node, 4, 1)
    )
    return index[:dim] + (index[dim] * step + start,) + index[dim + 1 :]


def _select(node: Node, source: Node, index: Index, extents: Mapping[str, Size]) -> Index:
    sizes = shape_of(source)
    dim = dim_argument(node, 1, len(sizes))
    at = size_of(argument(node, 2, 0))
    if isinstance(at, int) and at < 0:
        at = at + sizes[dim]
    return index[:dim] + (Affine.constant(at),) + index[dim:]


def _diagonal(node: Node, source: Node, index: Index, extents: Mapping[str, Size]) -> Index:
    rank = len(shape_of(source))
    offset = argument(node, 1, 0)
    first, second = dim_argument(node, 2, rank), dim_argument(node, 3, rank, 1)
    rest = iter(index[:-1])
    places = {first: index[-1] + max(-offset, 0), second: index[-1] + max(offset, 0)}
    return tuple(places[d] if d in places else next(rest) for d in range(rank))


def _split_item(node: Node, source: Node, index: Index) -> tuple[Node, Index]:
    """``getitem`` of split, split_with_sizes, chunk or unbind."""
    base, at = source.args[0], node.args[1]
    assert isinstance(base, Node)
    assert isinstance(at, int)
    rank = len(shape_of(base))
    if source.target is aten.unbind.int:
        dim = dim_argument(source, 1, rank)
        return base, index[:dim] + (Affine.constant(at),) + index[dim:]
    dim = dim_argument(source, 2, rank)
    start: Size = 0
    for part in source.meta["val"][:at]:
        start = start + size_of(part.shape[dim])
    return base, index[:dim] + (index[dim] + start,) + index[dim + 1 :]


RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.chunk.default}

VIEWS: dict[Any, Callable[[Node, Node, Index, Mapping[str, Size]], Index]] = {
    **dict.fromkeys(RESHAPES, _reshape),
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.diagonal.default: _diagonal,
    aten.alias.default: _same,
    aten.detach.default: _same,
}


def is_view(node: Node) -> bool:
    """Whether the node's result shares its input's storage by an index map known here."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, Node) and source.target in SPLITS
    return node.target in VIEWS


def storage_owner(node: Node) -> Node:
    """The node whose storage a chain of views shows."""
    while is_view(node):
        node = viewed(node)
    return node


def viewed(view: Node) -> Node:
    """What a view is a view of; a part of a split, of what is split."""
    source = view.args[0]
    assert isinstance(source, Node)
    if view.target is operator.getitem:
        source = source.args[0]
        assert isinstance(source, Node)
    return source
