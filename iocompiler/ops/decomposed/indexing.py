"""Scatters of one element a line as comparisons with an iota; rolls, triangles and conversions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iocompiler.graph.sizes import equal, same_sizes
from iocompiler.ops.decomposed.arithmetic import DECLINED, cast

aten = torch.ops.aten


def _line_of(base: Tensor, dim: int, index: Tensor) -> Tensor | None:
    """Where ``index`` points in ``base``, as a mask, if it names one element of every line along
    ``dim``.
    """
    if base.dim() == 0 or index.dim() != base.dim():
        return None
    dim = dim % base.dim()
    wanted = [1 if d == dim else size for d, size in enumerate(base.shape)]
    if not same_sizes(index.shape, wanted):
        return None
    positions = torch.arange(base.shape[dim], device=base.device)
    return positions.reshape([-1] + [1] * (base.dim() - dim - 1)) == index


def scatter_value(base: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """One place a line gets ``value``: ``where(iota == index, value, base)``."""
    here = _line_of(base, dim, index)
    if here is None:
        return DECLINED
    return torch.where(
        here, aten.scalar_tensor.default(value, dtype=base.dtype, device=base.device), base
    )


def scatter_src(base: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """As `scatter_value`, the value of each line read from ``src``."""
    here = _line_of(base, dim, index)
    if here is None or src.shape != index.shape:
        return DECLINED
    return torch.where(here, src, base)


def scatter_add(base: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """One place a line is added to (the gradient of a gather of one element a line)."""
    here = _line_of(base, dim, index)
    if here is None or src.shape != index.shape:
        return DECLINED
    return base + torch.where(here, src, 0)


def roll(x: Tensor, shifts: Any, dims: Any = ()) -> Tensor:
    """Two slices and a concatenation for each dimension; without dims, of the flat tensor."""
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not dims and len(shifts) == 1:
        return roll(x.reshape(-1), shifts, [0]).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        size = x.shape[dim]
        if not isinstance(size, int):
            return DECLINED
        cut = size - shift % size if size else 0
        if cut % max(size, 1):
            x = torch.cat(
                [aten.slice.Tensor(x, dim, cut, size), aten.slice.Tensor(x, dim, 0, cut)], dim
            )
    return x.clone() if x._is_view() else x


def split(x: Tensor, size: Any, dim: int = 0) -> tuple[Tensor, ...]:
    """aten.split and unsafe_split: slices."""
    from torch.fx.experimental.symbolic_shapes import guard_int

    total = x.shape[dim]
    pieces = (
        1 if isinstance(size, int) and size == 0 else max(1, guard_int((total + size - 1) // size))
    )
    return split_with_sizes(x, [*[size] * (pieces - 1), total - size * (pieces - 1)], dim)


def split_with_sizes(x: Tensor, sizes: Sequence[Any], dim: int = 0) -> tuple[Tensor, ...]:
    """aten.split_with_sizes: slices."""
    found, start = [], 0
    for size in sizes:
        found.append(aten.slice.Tensor(x, dim, start, start + size))
        start = start + size
    return tuple(found)


def unbind(x: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """aten.unbind: selections."""
    return tuple(aten.select.int(x, dim, i) for i in range(x.shape[dim]))


def to_copy(
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """A change of dtype is a cast, one of device stays a copy, aten's own."""
    moved = device is not None and torch.device(device) != x.device
    if (
        moved
        or layout not in (None, x.layout)
        or x.is_complex()
        or (dtype is not None and dtype.is_complex)
    ):
        return DECLINED
    if dtype is None or dtype == x.dtype:
        return x.clone(memory_format=memory_format)
    converted = cast(x, dtype)
    if memory_format is None or memory_format == torch.preserve_format:
        return converted
    return converted.contiguous(memory_format=memory_format)


def copy(into: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
    """aten.copy: the values of ``x``, as ``into`` lies. Where a result in order lies so, ``into``
    (memory that autograd asked for, behind each write into a slice) is not needed.
    """
    plain = into.layout == x.layout == torch.strided and not (into.is_complex() or x.is_complex())
    if not plain or into.device != x.device or not _is_in_order(into):
        return DECLINED
    whole = x.expand(into.shape)
    if into.dtype == x.dtype:
        return whole.clone(memory_format=torch.contiguous_format)
    return cast(whole, into.dtype).contiguous()


def _is_in_order(x: Tensor) -> bool:
    """Whether its strides are those of an empty tensor of its shape."""
    expected: Any = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if not equal(stride, expected):
            return False
        expected = expected * size
    return True


def take(x: Tensor, index: Tensor) -> Tensor:
    """aten.take: elements of the flattened ``x``. Python's ``x[index]`` would read a 0-dim index on
    the host.
    """
    result: Tensor = aten.index.Tensor(x.reshape(-1), [index])
    return result


def negated(x: Tensor) -> Tensor:
    """aten._neg_view (the imaginary part of a lazy conjugate) says that memory holds the negatives
    of the values, which kernels would not know.
    """
    return -x


DECOMPOSITIONS = {
    aten._neg_view.default: negated,
    aten.take.default: take,
    aten.scatter.value: scatter_value,
    aten.scatter.src: scatter_src,
    aten.scatter_add.default: scatter_add,
    aten.roll.default: roll,
    aten._to_copy.default: to_copy,
    aten.copy.default: copy,
    aten.split.Tensor: split,
    aten.unsafe_split.Tensor: split,
    aten.split_with_sizes.default: split_with_sizes,
    aten.unsafe_split_with_sizes.default: split_with_sizes,
    aten.unbind.int: unbind,
}
