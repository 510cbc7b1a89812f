"""Which calls of aten are products that the matmul template can make, and of what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from iocompiler.plan.data import AtenStep, Ref, TensorSpec
from iocompiler.plan.matrix import Added
from iocompiler.plan.sizes import divide, equal
from iocompiler.tf32 import products_rounded
from iocompiler.tile.index import Size
from iocompiler.tile.program import Buffer

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Strides = tuple[Size, Size, Size]


@dataclass(frozen=True)
class Pair:
    """A left [m, k] and a right [k, n] matrix: names, and strides along rows, along columns, along
    the batch.
    """

    k: Size
    left: tuple[str, Strides]
    right: tuple[str, Strides]


@dataclass(frozen=True)
class Factors:
    """A product [batch, m, n] of left [m, k] and right [k, n], as one call makes it.

    Attributes:
        left, right: name, and strides along rows, along columns, along the batch.
        result: its strides along the batch, along rows, along columns.
        added: name, strides likewise and elements of what is added to the sums; or None.
        elements: from the result's first to its last.
        tf32: float32 operands are rounded to it.
        start: the first column of a whole product that is meant.
        more: whose products are added to it.
    """

    title: str
    batch: Size
    m: Size
    n: Size
    k: Size
    dtype: torch.dtype
    left: tuple[str, Strides]
    right: tuple[str, Strides]
    result: Strides
    added: tuple[str, Strides, Size] | None
    elements: Size
    tf32: bool
    start: Size = 0
    more: tuple[Pair, ...] = ()

    def halves(self) -> tuple[Factors, Factors] | None:
        """Its left and its right columns as two products of one left operand."""
        half = divide(self.n, 2)
        if half is None or self.more:
            return None
        return replace(self, n=half), replace(self, n=half, start=half)

    @property
    def reads(self) -> tuple[str, ...]:
        added = (self.added[0],) if self.added is not None else ()
        return (*self.operands, *added)

    @property
    def operands(self) -> tuple[str, ...]:
        """In the order of a `Product`'s."""
        more = [side[0] for pair in self.more for side in (pair.left, pair.right)]
        return (self.left[0], self.right[0], *more)

    def pairs_with(self, other: Factors) -> bool:
        """Whether both are products of one left operand, of equal shape."""
        mine, theirs = (
            (self.batch, self.m, self.n, self.k),
            (other.batch, other.m, other.n, other.k),
        )
        same = all(equal(a, b) for a, b in zip(mine, theirs, strict=True))
        if self.more or other.more:
            return False
        return same and (self.left, self.dtype) == (other.left, other.dtype)

    def added_to(self, name: str) -> Added | None:
        """What is added, as the buffer ``name`` of an epilogue."""
        if self.added is None:
            return None
        _, strides, elements = self.added
        return Added(Buffer(name, self.dtype, "in", elements), strides, self.start * strides[2])


def factors_of(step: AtenStep, specs: Mapping[str, TensorSpec]) -> Factors | None:
    """The factors of a call; None where it is no product, or one the template cannot make."""
    read = _OPERATORS.get(step.target)
    if read is None or any(value != 1 for _, value in step.kwargs) or len(step.outputs) != 1:
        return None
    pairs, added = read(step.args)
    ((name, spec),) = step.outputs
    if name is None or spec is None or spec.dtype not in DTYPES:
        return None
    operands = [operand for pair in pairs for operand in pair]
    for tensor in (*operands, added) if added is not None else operands:
        there = specs.get(tensor.name) if isinstance(tensor, Ref) else None
        if there is None or (there.dtype, there.device) != (spec.dtype, spec.device):
            return None
    first, *more = (_pair(left.name, right.name, specs) for left, right in pairs)
    batch = spec.shape[0] if len(spec.shape) == 3 else 1
    m, n = spec.shape[-2:]
    return Factors(
        step.target.split(".")[1],
        batch, m, n, first.k, spec.dtype,
        first.left,
        first.right,
        _by_direction(spec),
        (added.name, _spread(specs[added.name]), _elements(specs[added.name]))
        if added is not None
        else None,
        _elements(spec),
        spec.dtype == torch.float32 and products_rounded(),
        more=tuple(more),
    )  # fmt: skip


def _pair(left: str, right: str, specs: Mapping[str, TensorSpec]) -> Pair:
    a, b = specs[left], specs[right]
    return Pair(a.shape[-1], (left, _strides(a)), (right, _strides(b)))


_Read = Callable[[tuple[Any, ...]], tuple[list[tuple[Any, Any]], Any]]

_OPERATORS: dict[str, _Read] = {
    "aten.mm.default": lambda args: ([args[:2]], None),
    "aten.bmm.default": lambda args: ([args[:2]], None),
    "aten.addmm.default": lambda args: ([args[1:3]], args[0]),
    "aten.baddbmm.default": lambda args: ([args[1:3]], args[0]),
    "iocompiler.aligned_mm.default": lambda args: ([args[:2]], args[2]),
    "iocompiler.sum_of_products.default": lambda args: (list(zip(*args, strict=True)), None),
}
"""Of each operator's arguments: pairs of left and right whose products are added up, and what is
added to them.
"""


def _strides(spec: TensorSpec) -> Strides:
    """Along rows, along columns, along the batch."""
    row, column = spec.stride[-2:]
    return row, column, spec.stride[0] if len(spec.shape) == 3 else 0


def _by_direction(spec: TensorSpec) -> Strides:
    """Along the batch, along rows, along columns."""
    row, column, batch = _strides(spec)
    return batch, row, column


def _spread(spec: TensorSpec) -> Strides:
    """The strides of a tensor that is broadcast over a result, by direction."""
    strides: list[Size] = [0] * (3 - len(spec.shape))
    strides += [0 if size == 1 else s for size, s in zip(spec.shape, spec.stride, strict=True)]
    batch, row, column = strides
    return batch, row, column


def _elements(spec: TensorSpec) -> Size:
    if 0 in spec.shape:
        return 0
    return sum(((n - 1) * s for n, s in zip(spec.shape, spec.stride, strict=True)), 1)
