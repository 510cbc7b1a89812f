"""The tile program: what one generated kernel computes, for every point of its iteration space.

A program is a flat list of operations in single-assignment form over a rectangular space of
*parallel* and *reduced* axes. It says nothing of blocks, warps or loops: a `Schedule` does. One
program has three readers: the Triton emitter (`codegen/triton.py`), the CPU reference interpreter
(`tile/interpret.py`) and the byte count (`tile/traffic.py`).

Kinds of operation (the idea of a small closed set of tile primitives is that of Tensor Processing
Primitives, Georganas et al., SC21):

====== =========================================================================================
load   ``buffer[index]``, ``value`` where the optional mask input is false
store  ``buffer[index] = input`` (optional mask as second input); ``fn`` "", "atomic_add", or
       "partial": a row of ``buffer`` for each program, as the schedule "rows" writes them
const  a literal, or a size expression
iota   the value of the affine ``index`` itself, int64
map    a row of ``tile/ops.py`` MAPS applied to the inputs, elementwise
cast   the input converted to ``dtype``
reduce a row of REDUCES over all axes of one kind (``over`` is "reduced" or "parallel")
scan   an inclusive scan (row of SCANS) along the one reduced axis
rand   float32 uniform in (0, 1): Philox2x32-7 (``tile/philox.py``) of counter ``index`` under the
       seed input
====== =========================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

import torch

from iocompiler.tile.index import Affine, Axis, Size

Kind: TypeAlias = Literal["load", "store", "const", "iota", "map", "cast", "reduce", "scan", "rand"]
Over: TypeAlias = Literal["reduced", "parallel"]
Constant: TypeAlias = "bool | int | float | Size"


@dataclass(frozen=True)
class Op:
    """One operation; its position in `TileProgram.ops` is the name of its value."""

    kind: Kind
    dtype: torch.dtype
    inputs: tuple[int, ...] = ()
    fn: str = ""
    buffer: str = ""
    index: Affine | None = None
    value: Constant = 0
    over: Over = "reduced"

    @property
    def reads(self) -> tuple[int, ...]:
        """Positions of every value this operation needs, those inside its index too."""
        return self.inputs + (self.index.values if self.index is not None else ())


@dataclass(frozen=True)
class Buffer:
    """A tensor argument of a kernel: at most ``elements`` elements in a row behind one pointer.

    ``role`` is "in", "out" (written, never read) or "inout". A 0-dim CPU tensor or Python number
    handed in at run time has role "scalar": it is passed by value and loaded without an address.
    """

    name: str
    dtype: torch.dtype
    role: Literal["in", "out", "inout", "scalar"]
    elements: Size


@dataclass(frozen=True)
class TileProgram:
    """Operations over ``parallel`` x ``reduced`` axes, outermost first; ``buffers`` as passed."""

    parallel: tuple[Axis, ...]
    reduced: tuple[Axis, ...]
    buffers: tuple[Buffer, ...]
    ops: tuple[Op, ...]

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.parallel + self.reduced

    def buffer(self, name: str) -> Buffer:
        return next(b for b in self.buffers if b.name == name)

    @cached_property
    def varies(self) -> tuple[frozenset[str], ...]:
        """The names of the axes each value depends on: a reduction's not on those it is over."""
        parallel = {a.name for a in self.parallel}
        reduced = {a.name for a in self.reduced}
        found: list[frozenset[str]] = []
        for op in self.ops:
            names = set(op.index.axes if op.index else ())
            for read in op.reads:
                names |= found[read]
            if op.kind == "reduce":
                names -= reduced if op.over == "reduced" else parallel
            found.append(frozenset(names))
        return tuple(found)

    @cached_property
    def size_symbols(self) -> tuple[str, ...]:
        """Names of the run-time sizes the program reads, sorted; passed after the buffers."""
        found: set[str] = set()
        for size in self._sizes():
            if not isinstance(size, (int, float)):
                found |= {s.name for s in size.free_symbols}
        return tuple(sorted(found))

    def _sizes(self) -> list[Size]:
        sizes: list[Size] = [a.size for a in self.axes]
        for op in self.ops:
            if op.index is not None:
                sizes += [c for _, c in op.index.terms] + [op.index.const]
            sizes.append(op.value)
        return sizes

    def __str__(self) -> str:
        lines = [
            "program("
            + ", ".join(
                f"{b.name}: {b.role} {str(b.dtype)[6:]}[{b.elements}]" for b in self.buffers
            )
            + ")",
            "  parallel " + ", ".join(f"{a.name}<{a.size}" for a in self.parallel),
        ]
        if self.reduced:
            lines.append("  reduced  " + ", ".join(f"{a.name}<{a.size}" for a in self.reduced))
        lines += [f"  {_show(position, op)}" for position, op in enumerate(self.ops)]
        return "\n".join(lines)


def _show(position: int, op: Op) -> str:
    inputs = ", ".join(f"%{i}" for i in op.inputs)
    dtype = str(op.dtype)[6:]
    match op.kind:
        case "store":
            return f"{op.fn or 'store'} {op.buffer}[{op.index}] = {inputs}"
        case "load":
            masked = f" if {inputs} else {op.value}" if inputs else ""
            return f"%{position}: {dtype} = load {op.buffer}[{op.index}]{masked}"
        case "const":
            return f"%{position}: {dtype} = {op.value}"
        case "iota" | "rand":
            operands = ", ".join(filter(None, [str(op.index), inputs]))
            return f"%{position}: {dtype} = {op.kind}({operands})"
        case "reduce":
            return f"%{position}: {dtype} = {op.fn} over {op.over} ({inputs})"
        case _:
            return f"%{position}: {dtype} = {op.fn or op.kind}({inputs})"


@dataclass
class Builder:
    """Appends operations to a program in the making; one equal to an earlier one is that one."""

    ops: list[Op] = field(default_factory=list)
    _seen: dict[Op, int] = field(default_factory=dict)

    def add(self, op: Op) -> int:
        if op.kind == "store":
            self.ops.append(op)
            return len(self.ops) - 1
        if op not in self._seen:
            self._seen[op] = len(self.ops)
            self.ops.append(op)
        return self._seen[op]

    def dtype(self, value: int) -> torch.dtype:
        return self.ops[value].dtype

    def const(self, value: Constant, dtype: torch.dtype) -> int:
        # repr keeps 0.0 and -0.0, True and 1 apart: Python calls them equal
        key = Op("const", dtype, value=value, fn=repr(value))
        return self.add(key)

    def load(
        self,
        buffer: str,
        index: Affine,
        dtype: torch.dtype,
        mask: int | None = None,
        other: Constant = 0,
    ) -> int:
        inputs = () if mask is None else (mask,)
        return self.add(Op("load", dtype, inputs, buffer=buffer, index=index, value=other))

    def store(
        self, buffer: str, index: Affine, value: int, mask: int | None = None, fn: str = ""
    ) -> int:
        inputs = (value,) if mask is None else (value, mask)
        return self.add(Op("store", self.dtype(value), inputs, fn, buffer, index))

    def iota(self, index: Affine) -> int:
        return self.add(Op("iota", torch.int64, index=index))

    def map(self, fn: str, *inputs: int, dtype: torch.dtype | None = None) -> int:
        return self.add(Op("map", dtype or self.dtype(inputs[-1]), inputs, fn))

    def cast(self, value: int, dtype: torch.dtype) -> int:
        return value if self.dtype(value) == dtype else self.add(Op("cast", dtype, (value,)))

    def reduce(self, fn: str, value: int, dtype: torch.dtype, over: Over = "reduced") -> int:
        return self.add(Op("reduce", dtype, (value,), fn, over=over))

    def scan(self, fn: str, value: int) -> int:
        return self.add(Op("scan", self.dtype(value), (value,), fn))

    def rand(self, seed: int, counter: Affine) -> int:
        return self.add(Op("rand", torch.float32, (seed,), "uniform", index=counter))

    def program(
        self, parallel: tuple[Axis, ...], reduced: tuple[Axis, ...], buffers: tuple[Buffer, ...]
    ) -> TileProgram:
        """The finished program, operations no store needs left out."""
        return drop_dead(TileProgram(parallel, reduced, buffers, tuple(self.ops)))


def drop_dead(program: TileProgram) -> TileProgram:
    """Remove operations whose value reaches no store, and the buffers nobody touches any more."""
    live: set[int] = set()
    for position in range(len(program.ops) - 1, -1, -1):
        op = program.ops[position]
        if op.kind == "store" or position in live:
            live.add(position)
            live.update(op.reads)
    ops = _in_order(program, sorted(live))
    touched = {op.buffer for op in ops}
    return TileProgram(
        program.parallel,
        program.reduced,
        tuple(b for b in program.buffers if b.name in touched),
        ops,
    )


def without_store(program: TileProgram, buffer: str) -> TileProgram:
    """The program without what it stores into a buffer, and what only that needs."""
    ops = enumerate(program.ops)
    kept = [at for at, op in ops if op.kind != "store" or op.buffer != buffer]
    return drop_dead(replace(program, ops=_in_order(program, kept)))


def loads_first(program: TileProgram) -> TileProgram:
    """The program with no load behind a store to its buffer: all of them read what was there."""
    stored: set[str] = set()
    late = False
    for op in program.ops:
        late |= op.kind == "load" and op.buffer in stored
        stored |= {op.buffer} if op.kind == "store" else set()
    if not late:
        return program
    places = range(len(program.ops))
    order = sorted(places, key=lambda place: program.ops[place].kind == "store")
    return replace(program, ops=_in_order(program, order))


def _in_order(program: TileProgram, places: Sequence[int]) -> tuple[Op, ...]:
    """The operations at these places, each behind those it reads."""
    renumber = {old: new for new, old in enumerate(places)}
    return tuple(_renumbered(program.ops[old], renumber) for old in places)


def _renumbered(op: Op, renumber: dict[int, int]) -> Op:
    index = op.index
    if index is not None and index.values:
        index = index.substitute({f"%{v}": Affine.of(f"%{renumber[v]}") for v in index.values})
    return Op(
        op.kind,
        op.dtype,
        tuple(renumber[i] for i in op.inputs),
        op.fn,
        op.buffer,
        index,
        op.value,
        op.over,
    )
