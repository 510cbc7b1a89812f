"""The sum a kernel begins with: a product, and what is added to it element by element.

    p = load product[i]; r = load added[i]            p = load product[i]
    s = add(p, r); store h[i] = s; ... s ...    -->   ... p ...

Where the kernel stores that very sum, the sum may be made where the product is. What the kernel
reads in the product's place is then the sum, and it has one load and one store less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import torch

from iocompiler.plan.sizes import equal
from iocompiler.tile.arrange import merge_axes
from iocompiler.tile.index import Affine, Axis, Size, product, row_major
from iocompiler.tile.program import Op, TileProgram, without_store

_MOST_AXES = 5
"""That are tried in every order."""


@dataclass(frozen=True)
class FirstSum:
    """Buffers of a program, by name.

    Attributes:
        added: what lies in memory as the product does, and is added to it.
        bias: what is added to each of its rows.
        stored: where the sum is stored.
        rest: the program with the sum in the product's buffer; None where nothing is left to do.
    """

    added: str | None
    bias: str | None
    stored: str
    rest: TileProgram | None


def first_sum(program: TileProgram, buffer: str, columns: Size) -> FirstSum | None:
    """The sum of a product in rows of ``columns`` elements, all of which the program reads from
    ``buffer``, one after another; None where it does something else with them.
    """
    return _Reader(program, buffer, columns).found()


def _order(
    axes: Sequence[Axis], index: Affine | None, columns: Size
) -> tuple[Affine | None, list[Affine]]:
    """An index, if it is that of each element in a row, outer axes to inner in some order; and what
    is that in rows of ``columns``.
    """
    for ordered in permutations(axes) if len(axes) <= _MOST_AXES else ():
        if row_major(ordered) == index:
            tails = [ordered[first:] for first in range(len(ordered))]
            rows = [t for t in tails if equal(product([a.size for a in t]), columns)]
            return index, [row_major(tail) for tail in rows]
    return None, []


class _Reader:
    """A program as it is read from a product's buffer on.

    Attributes:
        order: where a point of the program lies in memory. rows: where it lies in a row; both by
            the product's load.
        readers: of each value, the operations that read it.
    """

    def __init__(self, program: TileProgram, buffer: str, columns: Size) -> None:
        self.program, self.buffer = program, buffer
        self.dtype = program.buffer(buffer).dtype
        merged = merge_axes(program)  # operation by operation the same
        self.ops, axes = merged.ops, merged.axes
        self.loads = [at for at, op in enumerate(self.ops) if op.buffer == buffer]
        self.order, self.rows = _order(axes, self.ops[self.loads[0]].index, columns)
        self.readers: list[set[int]] = [set() for _ in self.ops]
        for position, op in enumerate(self.ops):
            for read in op.reads:
                self.readers[read].add(position)

    def found(self) -> FirstSum | None:
        first, *others = self.loads
        if others or self.order is None or self._loaded(first) is None:
            return None
        total, added, bias = first, "", ""
        while True:
            values = self._as_cast(total)
            readers = set[int]().union(*(self.readers[value] for value in values)) - values
            if any(self.ops[at].kind == "store" for at in readers):
                break
            following = self._added(readers, values)
            if following is None:
                return None
            total, load = following
            if load.index == self.order and not added:
                added = load.buffer
            elif load.index in self.rows and not bias:
                bias = load.buffer
            else:
                return None
        places = [self.ops[at].buffer for at in sorted(readers) if self._is_place(self.ops[at])]
        if total == first or not self._is_rounded(total) or not places:
            return None
        stored = places[0]
        rest = self._rest(first, total, values, stored)
        if rest is not None and added in {each.name for each in rest.buffers}:
            return None  # it would be read twice
        return FirstSum(added or None, bias or None, stored, rest)

    def _added(self, readers: set[int], values: set[int]) -> tuple[int, Op] | None:
        """What alone reads the values, where that adds what is loaded: it, and the load."""
        if len(readers) != 1:
            return None
        (at,) = readers
        op = self.ops[at]
        if op.kind != "map" or op.fn != "add" or op.dtype != torch.float32:
            return None
        others = [value for value in op.inputs if value not in values]
        load = self._loaded(others[0]) if len(others) == 1 else None
        return None if load is None else (at, load)

    def _as_cast(self, value: int) -> set[int]:
        """A value and what it is in float32, and rounded to the product's dtype."""
        found, new = {value}, [value]
        while new:
            for reader in self.readers[new.pop()] - found:
                op = self.ops[reader]
                if op.kind == "cast" and op.dtype in (self.dtype, torch.float32):
                    found.add(reader)
                    new.append(reader)
        return found

    def _loaded(self, value: int) -> Op | None:
        """The load of the product's dtype that a value is, but for its rounding."""
        op = self.ops[value]
        while op.kind == "cast" and op.dtype in (self.dtype, torch.float32):
            op = self.ops[op.inputs[0]]
        if op.kind != "load" or op.reads or op.dtype != self.dtype:
            return None
        return op if self.program.buffer(op.buffer).role == "in" else None

    def _is_rounded(self, total: int) -> bool:
        """Whether nothing reads the sum as it is before it is rounded."""
        readers = [self.ops[at] for at in self.readers[total]]
        return all(op.kind == "cast" and op.dtype == self.dtype for op in readers)

    def _is_place(self, op: Op) -> bool:
        """Whether it stores the sum, all of it and as the product lies, into a result."""
        return (
            op.kind == "store"
            and not op.fn
            and len(op.inputs) == 1
            and op.index == self.order
            and op.dtype == self.dtype
            and self.program.buffer(op.buffer).role == "out"
            and sum(other.buffer == op.buffer for other in self.ops) == 1
        )

    def _rest(self, load: int, total: int, values: set[int], stored: str) -> TileProgram | None:
        """The program with the sum in the product's buffer, as ``values`` have it."""
        ops = list(self.program.ops)
        if not any(op.kind == "store" and op.buffer != stored for op in ops):
            return None
        wide = Op("cast", torch.float32, (load,))
        instead = {at: load if ops[at].dtype == self.dtype else total for at in values - {total}}
        for position, op in enumerate(ops):
            ops[position] = replace(op, inputs=tuple(instead.get(i, i) for i in op.inputs))
        ops[total] = wide
        return without_store(replace(self.program, ops=tuple(ops)), stored)
