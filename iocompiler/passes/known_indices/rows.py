"""What stands where a gather stood: a slice of the table, spread over the dims of its index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from iocompiler.graph.sizes import known
from iocompiler.passes.known_indices.affine import Affine, Integer

aten = torch.ops.aten


class NoSlice(Exception):
    """The rows an index reads are no slice; the message says why."""


@dataclass(frozen=True)
class Rows:
    """Rows ``first``, ``first + step`` ... of a table: ``sizes`` many, in row-major order.

    ``dims`` are the index's dims these sizes belong to, outermost first; those in ``backwards`` go
    from the last row to the first; all other dims of the index repeat.
    """

    first: Integer
    step: Integer
    sizes: tuple[Integer, ...]
    dims: tuple[int, ...]
    backwards: tuple[int, ...]

    @property
    def count(self) -> Integer:
        total: Integer = 1
        for size in self.sizes:
            total = total * size
        return total

    @property
    def end(self) -> Integer:
        """One behind the last row."""
        return self.first + (self.count - 1) * self.step + 1

    def holds(self, row: int) -> bool:
        """Whether a row may be one of these."""
        if not isinstance(self.first, int) or not isinstance(self.step, int):
            return not (known(row < self.first) or known(row >= self.end))
        outside = row < self.first or known(row >= self.end)
        return not outside and (row - self.first) % self.step == 0

    def __str__(self) -> str:
        if not self.sizes:
            return f"row {self.first}"
        stride = "" if known(self.step == 1) else f":{self.step}"
        return f"rows {self.first}:{self.end}{stride}"


def rows_of(index: Affine) -> Rows:
    """The rows an affine index reads.

    Raises:
        NoSlice: they are not one slice.
    """
    first = index.const
    moving: list[tuple[Integer, Integer, int]] = []
    backwards = []
    for dim, (step, size) in enumerate(zip(index.steps, index.sizes, strict=True)):
        if known(step == 0) or known(size == 1):
            continue
        if known(step < 0):
            first, step = first + step * (size - 1), -step
            backwards.append(dim)
        elif not known(step > 0):
            raise NoSlice(f"whether {step} is positive is not known")
        moving.append((step, size, dim))
    outer_first = _nested(moving)
    step = outer_first[-1][0] if outer_first else 1
    sizes = tuple(size for _, size, _ in outer_first)
    dims = tuple(dim for _, _, dim in outer_first)
    rows = Rows(first, step, sizes, dims, tuple(backwards))
    if not known(step == 1) and not known(rows.count >= 1):
        raise NoSlice("there may be no row at all")
    return rows


def _nested(moving: Sequence[tuple[Integer, Integer, int]]) -> list[tuple[Integer, Integer, int]]:
    """The dims in the order in which each steps over all of the next."""
    inner_first: list[tuple[Integer, Integer, int]] = []
    left = list(moving)
    while left:
        reach = inner_first[-1][0] * inner_first[-1][1] if inner_first else None
        following = [
            each
            for each in left
            if (known(each[0] == reach) if reach is not None else _least(each, left))
        ]
        if not following:
            steps = " and ".join(str(each[0]) for each in moving)
            raise NoSlice(f"steps of {steps} rows do not lead over each other's")
        inner_first.append(following[0])
        left.remove(following[0])
    return inner_first[::-1]


def _least(one: tuple[Integer, Integer, int], among: Iterable[tuple[Integer, Any, Any]]) -> bool:
    return all(known(one[0] <= other[0]) for other in among)


def spread(
    table: Any,
    rank: int,
    dim: int,
    rows: Rows,
    index: Affine,
    spell: Callable[[Integer], Any],
    whole: bool,
) -> Any:
    """The ``rows`` of a table of ``rank`` dims along ``dim``, in the places of the index: a copy.

    ``spell`` gives an integer as what an operator takes; ``whole`` says that these are all rows.
    """
    if not index.rank:
        return _contiguous(aten.select.int(table, dim, spell(rows.first)))
    if not whole:
        limits = spell(rows.first), spell(rows.end)
        table = aten.slice.Tensor(table, dim, *limits, spell(rows.step))
    placed = _in_order(table, rank, dim, rows, spell)
    # one row has a dim, too: it stands for the first that repeats
    for place in range(index.rank):
        if place not in (rows.dims or (0,)):
            placed = aten.unsqueeze.default(placed, dim + place)
    sizes = [spell(size) for size in index.sizes]
    return _contiguous(aten.expand.default(placed, [*[-1] * dim, *sizes, *[-1] * (rank - dim - 1)]))


def _contiguous(tensor: Any) -> Any:
    return aten.clone.default(tensor, memory_format=torch.contiguous_format)


def _in_order(table: Any, rank: int, dim: int, rows: Rows, spell: Callable[[Integer], Any]) -> Any:
    """The slice with a dim for each of the index's dims that move, in their order."""
    order = sorted(rows.dims)
    if len(order) > 1:
        table = aten.unflatten.int(table, dim, [spell(size) for size in rows.sizes])
    if list(rows.dims) != order:
        inner = [dim + rows.dims.index(each) for each in order]
        outer = [d + len(order) - 1 for d in range(dim + 1, rank)]
        table = aten.permute.default(table, [*range(dim), *inner, *outer])
    if rows.backwards:
        table = aten.flip.default(table, [dim + order.index(each) for each in rows.backwards])
    return table
