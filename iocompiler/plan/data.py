"""The plan: what a compiled graph does, step by step, as frozen data.

A plan is made by `plan/build.py`, read by `codegen/module.py` (the Python file that runs),
`runtime/reference.py` (the CPU reference) and `report/` (the ledger). Values have names; a step
reads names that stand before it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

from iocompiler.ops.library_product import Algorithm, LibraryProduct
from iocompiler.plan.place import Place
from iocompiler.plan.product import MatmulTile, Product
from iocompiler.tile.flat import LENGTH, PARTS
from iocompiler.tile.index import Size
from iocompiler.tile.program import Buffer, TileProgram


@dataclass(frozen=True)
class TensorSpec:
    """Shape and strides in elements (ints or size expressions), dtype and device of one tensor."""

    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    dtype: torch.dtype
    device: str

    @property
    def reach(self) -> Size:
        """Elements from the first to the last in memory, both counted, of one that is not empty."""
        reach: Size = 1
        for size, stride in zip(self.shape, self.stride, strict=True):
            reach = reach + (size - 1) * stride
        return reach


@dataclass(frozen=True)
class Schedule:
    """How a tile program becomes a kernel; `codegen/triton.py` finds the loops of each kind.

    - "pointwise": no reduction; a tile of ``x_block`` points of the inner parallel axis group, or
      ``y_block`` x ``x_block`` over two groups where accesses disagree on the contiguous axis.
      With ``programs``, so many walk all tiles of a product with one number, and none of them
      does anything where that is 1 and the result stands over what is multiplied; or the tiles
      of all tensors of a batch.
    - "persistent": a tile of ``x_block`` x ``r_block``, the whole reduced extent in registers.
    - "looped": ``x_block`` x ``r_block`` at a time, one loop over the reduced
      extent per dependent reduction.
    - "rows": like persistent with ``x_block`` rows, but ``programs`` programs walk all
      rows and accumulate reductions ``over="parallel"``; each writes one partial row
      (stores with ``fn="partial"``). A row that registers do not hold through its own reductions
      is loaded again after them (`tile/rows.py`).

    Loops of a "looped" or "rows" kernel keep ``num_stages - 1`` steps of loads in flight through
    shared memory where it is 3 or more. ``registers`` is the most a thread may have, so that
    several programs share a multiprocessor; 0 leaves it to the assembler.
    """

    kind: Literal["pointwise", "persistent", "looped", "rows"]
    x_block: int = 1
    y_block: int = 1
    r_block: int = 1
    num_warps: int = 4
    num_stages: int = 2
    programs: int = 0
    registers: int = 0


@dataclass(frozen=True)
class Ref:
    """A plan value standing as an argument of a step or as an output of the plan."""

    name: str


Argument: TypeAlias = Any
"""Ref, number, bool, str, None, Size, torch's dtype, device, layout or memory_format, an operator,
a `Region`; lists, tuples and dicts of these.
"""


@dataclass(frozen=True)
class KernelStep:
    """Launch one generated kernel: ``args`` are value names in the order of ``program.buffers``.

    ``outputs`` are allocated just before. ``nodes`` are the names of the FX nodes computed here,
    ``where`` the user's source lines, ``floor_bytes`` the least bytes these nodes' inputs and
    outputs allow (for the ledger). ``over`` has (result, input of the plan) where a result is not
    allocated but written over an input, if the call is the last that reads it
    (`runtime/last_reader.py`).
    """

    name: str
    program: TileProgram
    schedule: Schedule
    args: tuple[str, ...]
    outputs: tuple[tuple[str, TensorSpec], ...]
    nodes: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    over: tuple[tuple[str, str], ...] = ()

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """What stands behind each of ``args``."""
        return self.program.buffers

    @property
    def size_symbols(self) -> tuple[str, ...]:
        """The sizes that are passed after the buffers."""
        return self.program.size_symbols

    @property
    def kernel(self) -> Hashable:
        """Equal where one emitted kernel serves both steps."""
        return self.program, self.schedule


@dataclass(frozen=True)
class MatmulStep:
    """Launch the matmul template with an epilogue.

    ``program`` is the epilogue: pointwise over the results' axes, named b.., m.. and n.. by the
    direction they lie in. Its first buffers, one a product, are the float32 sums [batch, m, n],
    which never are in memory. ``args`` are value names in the order of `buffers`; the rest is as in
    a `KernelStep`. Of a product with others beside it, program and `sums` are the first one's.
    """

    name: str
    product: Product
    program: TileProgram
    tile: MatmulTile
    args: tuple[str, ...]
    outputs: tuple[tuple[str, TensorSpec], ...]
    nodes: tuple[str, ...] = ()
    where: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[Product, TileProgram]:
        """What is computed, whatever the tile."""
        return self.product, self.program

    @property
    def sums(self) -> tuple[Buffer, ...]:
        """The buffers of the program that stand for the products."""
        return self.program.buffers[: len(self.product.rights)]

    @property
    def tensors(self) -> tuple[Buffer, ...]:
        """The buffers of the program that are tensors in memory, or numbers."""
        return self.program.buffers[len(self.product.rights) :]

    @property
    def parts(self) -> tuple[MatmulStep, ...]:
        """Itself; or for each of several products beside each other what its own step would be,
        which makes nothing.
        """
        if not self.product.beside:
            return (self,)
        found, begin = [], 0
        for made, program in (
            (replace(self.product, beside=()), self.program),
            *self.product.beside,
        ):
            part = replace(self, product=made, program=program, args=(), outputs=())
            end = begin + len(part.buffers)
            found.append(replace(part, args=self.args[begin:end]))
            begin = end
        return tuple(found)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """What stands behind each of ``args``: the products' operands, then `tensors`; then those
        of the products beside it, their names numbered.
        """
        own = self.product.operands + self.tensors
        for place, part in enumerate(self.parts[1:], 1):
            own += tuple(replace(b, name=f"{b.name}_{place}") for b in part.buffers)
        return own

    @property
    def size_symbols(self) -> tuple[str, ...]:
        """The sizes that are passed after the buffers."""
        found = {*self.program.size_symbols, *self.product.size_symbols}
        for made, program in self.product.beside:
            found |= {*program.size_symbols, *made.size_symbols}
        return tuple(sorted(found))

    @property
    def kernel(self) -> Hashable:
        """Equal where one emitted kernel serves both steps."""
        return self.product, self.program, self.tile


@dataclass(frozen=True)
class BatchStep:
    """One launch of a kernel over many sets of tensors (an optimizer's parameters).

    ``program`` is over one axis of `tile.flat.LENGTH` points; each member gives the value names in
    the order of ``program.buffers`` and its own length. ``outputs`` are allocated just before.
    Where the program folds rows, `tile.flat.PARTS` many, ``parts`` has how many for each member.
    """

    name: str
    program: TileProgram
    schedule: Schedule
    members: tuple[tuple[tuple[str, ...], Size], ...]
    outputs: tuple[tuple[str, TensorSpec], ...]
    nodes: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    parts: tuple[Size, ...] = ()

    def extents(self) -> tuple[dict[str, Size], ...]:
        """Of each member, the values of the symbols of its program's axes."""
        lengths = [{LENGTH.name: length} for _, length in self.members]
        if not self.parts:
            return tuple(lengths)
        pairs = zip(lengths, self.parts, strict=True)
        return tuple({**length, PARTS.name: parts} for length, parts in pairs)

    @property
    def kernel(self) -> Hashable:
        """Equal where one emitted kernel serves both steps."""
        return self.program, self.schedule


@dataclass(frozen=True)
class AtenStep:
    """Call an operator that exists: ``target`` is its qualified name ("aten.mm.default").

    ``outputs`` names its results in order (None for one nobody reads); a single tensor result
    has one name and ``is_tuple`` false. A spec of None is a number, or a tensor whose layout nobody
    relies on. ``paths`` says where in the result each output lies, where that is not its position
    in one tuple (in a tuple of tuples, a dict). ``reason`` says why this is a plain call
    ("contraction: cuBLAS", "no rule for aten.sort"). ``product``: what a library is asked for by
    addresses in place of the operator; it reads what the operator would (`addressed.py`).
    """

    target: str
    args: tuple[Argument, ...]
    kwargs: tuple[tuple[str, Argument], ...]
    outputs: tuple[tuple[str | None, TensorSpec | None], ...]
    is_tuple: bool
    node: str = ""
    where: str = ""
    reason: str = ""
    paths: tuple[tuple[int | str, ...], ...] = ()
    product: LibraryProduct[Size] | None = None

    def results(self) -> tuple[tuple[tuple[int | str, ...], str, TensorSpec | None], ...]:
        """Of each result that is read: where it lies in what the call returns, name, spec."""
        paths = self.paths or tuple((i,) if self.is_tuple else () for i in range(len(self.outputs)))
        rows = zip(paths, self.outputs, strict=True)
        return tuple((path, name, spec) for path, (name, spec) in rows if name is not None)


@dataclass(frozen=True)
class ViewStep:
    """``base``'s storage seen with another shape and strides, ``offset`` elements on: 0 bytes."""

    name: str
    base: str
    spec: TensorSpec
    offset: Size = 0


@dataclass(frozen=True)
class ConstantStep:
    """A small tensor whose elements are known at compile time (``values`` row-major)."""

    name: str
    spec: TensorSpec
    values: tuple[float | int | bool, ...]


Step: TypeAlias = KernelStep | MatmulStep | BatchStep | AtenStep | ViewStep | ConstantStep


@dataclass(frozen=True)
class Unfused:
    """An edge that stayed in HBM; ``reason`` is the broken condition, or the prices compared."""

    producer: str
    consumer: str
    bytes: Size
    reason: str


@dataclass(frozen=True)
class Plan:
    """A whole graph.

    ``inputs`` are (name, spec) in call order, with spec None for a number and for a size, whose
    name is the size symbol. ``placed``: results that take the memory of what is dead, or lie behind
    another of their step, which then has room for all (`memory.py`). ``algorithms``: of a library's
    products, those of which another algorithm was measured to be faster than the first that the
    library proposes; inside of operators, all that were measured.
    """

    inputs: tuple[tuple[str, TensorSpec | None], ...]
    steps: tuple[Step, ...]
    outputs: tuple[Argument, ...]
    device: str
    unfused: tuple[Unfused, ...] = ()
    placed: tuple[tuple[str, Place], ...] = ()
    algorithms: tuple[tuple[LibraryProduct[int], Algorithm], ...] = ()


@dataclass(frozen=True)
class Region:
    """A function that a higher-order operator calls: a branch, a loop's body, a score.

    It takes the inputs of ``plan`` one by one, and returns the plan's outputs as a "tuple" or
    "list", or its one output as a plain "value". Under ``exact`` the plan relies on the layouts its
    inputs are specified with, which what is passed need not have.
    """

    name: str
    plan: Plan
    returns: Literal["value", "tuple", "list"]
    exact: bool = True
