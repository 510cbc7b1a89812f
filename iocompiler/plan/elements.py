"""Single elements of a tensor are passed by their addresses.

Layers that differ only in which element they read (the seed of their dropout) have one kernel:

    rand(seeds[7], ...)   -->   rand(seed[0], ...), where seed = seeds.data_ptr() + 7 elements
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from iocompiler.plan.sizes import nonnegative, normal
from iocompiler.tile.index import Affine
from iocompiler.tile.program import Buffer, Op, TileProgram


@dataclass(frozen=True)
class Argument:
    """What a kernel gets for a buffer: that of the old program, from ``offset`` elements on."""

    buffer: str
    offset: int = 0


def by_address(program: TileProgram) -> tuple[TileProgram, tuple[Argument, ...]]:
    """The program with a buffer of its own for each element of those of which it reads only single
    ones, known by number; and what stands behind each of its buffers.
    """
    picked = {b.name: _elements(program, b) for b in program.buffers}
    if not any(picked.values()):
        return program, tuple(Argument(b.name) for b in program.buffers)
    buffers: list[Buffer] = []
    arguments: list[Argument] = []
    for buffer in program.buffers:
        for name, offset in picked[buffer.name].items() or [(buffer.name, None)]:
            single = offset is not None
            buffers.append(replace(buffer, name=name, elements=1) if single else buffer)
            arguments.append(Argument(buffer.name, offset or 0))
    names = {(a.buffer, a.offset): b.name for a, b in zip(arguments, buffers, strict=True)}

    def moved(op: Op) -> Op:
        if not picked.get(op.buffer) or op.index is None:
            return op
        return replace(op, buffer=names[op.buffer, int(op.index.const)], index=Affine())

    ops = tuple(map(moved, program.ops))
    return TileProgram(program.parallel, program.reduced, tuple(buffers), ops), tuple(arguments)


def _elements(program: TileProgram, buffer: Buffer) -> dict[str, int]:
    """The name of a buffer for each of the elements that are read; none where others may be, or
    where one is not there, which a mask keeps from being read.
    """
    if buffer.role != "in" or buffer.elements == 1:
        return {}
    indices = [op.index for op in program.ops if op.buffer == buffer.name]
    if not indices or any(i is None or i.terms or not isinstance(i.const, int) for i in indices):
        return {}
    found = dict.fromkeys(int(i.const) for i in indices if i is not None)
    if min(found) < 0 or not nonnegative(normal(buffer.elements - 1 - max(found))):
        return {}
    return {f"{buffer.name}_{place}": offset for place, offset in enumerate(found)}
