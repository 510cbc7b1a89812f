"""The bytes a tile program moves to and from memory and the arithmetic it does: what is priced."""

from __future__ import annotations

from dataclasses import dataclass

from iocompiler.tile.index import Size, product
from iocompiler.tile.ops import MAPS
from iocompiler.tile.program import Op, TileProgram

VECTOR_BYTES = 16
"""The widest access of a thread, and of what feeds matrix units: lines that begin at no multiple of
it are moved in smaller pieces."""
# Rows of the op table at or above this cost go through the special function unit or a polynomial.
_TRANSCENDENTAL = 8
# Philox2x32-7 (a wide multiplication and a three-way xor a round), a quarter of a block an element,
# and the comparison: 7 instructions of sm_90, each in the time of a multiply-add, which counts as 2
_RAND_FLOPS = 14


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written once, arithmetic operations, transcendental functions; all `Size`."""

    read_bytes: Size
    written_bytes: Size
    flops: Size
    transcendentals: Size

    @property
    def bytes(self) -> Size:
        return self.read_bytes + self.written_bytes


def traffic(program: TileProgram) -> Traffic:
    """What one run of the program must move: every element it touches, once.

    A load counts the points of the axes it varies over; loads of one buffer at one index count
    once, and all loads of a buffer together never more than the buffer has.
    """
    read: Size = 0
    written: Size = 0
    for buffer in program.buffers:
        if buffer.role == "scalar":
            continue
        loads = _distinct(program, buffer.name, "load")
        stores = _distinct(program, buffer.name, "store")
        read = read + _capped(loads, buffer.elements) * buffer.dtype.itemsize
        written = written + _capped(stores, buffer.elements) * buffer.dtype.itemsize
    flops, special = _arithmetic(program)
    return Traffic(read, written, flops, special)


def _points(program: TileProgram, position: int) -> Size:
    varies = program.varies[position]
    return product([a.size for a in program.axes if a.name in varies])


def _distinct(program: TileProgram, buffer: str, kind: str) -> list[Size]:
    """Elements of each different access to the buffer; a partial store fills it whole."""
    seen: dict[object, Size] = {}
    for op in program.ops:
        if op.kind == kind and op.buffer == buffer:
            whole = op.fn == "partial"
            seen[op.index] = program.buffer(buffer).elements if whole else _access(program, op)
    return list(seen.values())


def _access(program: TileProgram, op: Op) -> Size:
    names = set(op.index.axes if op.index is not None else ())
    for value in op.index.values if op.index is not None else ():
        names |= program.varies[value]
    return product([a.size for a in program.axes if a.name in names])


def _capped(counts: list[Size], most: Size) -> Size:
    total: Size = 0
    for count in counts:
        total = total + count
    if isinstance(total, int) and isinstance(most, int):
        return min(total, most)
    # of a buffer of symbolic size one whole read is a better estimate than the sum of accesses
    return most if len(counts) > 1 else total


def _arithmetic(program: TileProgram) -> tuple[Size, Size]:
    flops: Size = 0
    special: Size = 0
    for position, op in enumerate(program.ops):
        if op.kind == "map":
            points, cost = _points(program, position), MAPS[op.fn].flops
            if cost >= _TRANSCENDENTAL:
                special = special + points
            else:
                flops = flops + points * cost
        elif op.kind in ("reduce", "scan"):
            flops = flops + _points(program, op.inputs[0])
        elif op.kind == "rand":
            flops = flops + _points(program, position) * _RAND_FLOPS
    return flops, special
