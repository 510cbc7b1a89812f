"""The modeled time of one generated kernel: what the planner compares."""

from __future__ import annotations

from collections.abc import Mapping

from iocompiler.cost_model.device import Device
from iocompiler.cost_model.roofline import BURST, TRANSCENDENTAL_FLOPS
from iocompiler.cost_model.schedule import choose
from iocompiler.cost_model.tiles import points
from iocompiler.tile.arrange import merge_axes, rows_contiguous
from iocompiler.tile.index import Axis, Size, product
from iocompiler.tile.program import TileProgram
from iocompiler.tile.split import can_split
from iocompiler.tile.traffic import traffic

# What memory gives where one element is asked for.
_SECTOR_BYTES = 32
# What a thread reads or writes in one instruction at most.
_WORD_BYTES = 16
# Of floating-point operations, a multiply-add is two, in the time of one such instruction: a
# multiprocessor has a quarter as many units for it.
_FLOPS_OF_A_WORD = 8
# Columns of a program that reduces down them.
_MOST_SIDE_BY_SIDE = 128


def kernel_seconds(program: TileProgram, device: Device, hints: Mapping[str, int]) -> float:
    """Roofline time: the longest of moving its bytes, through as many multiprocessors as have a
    program, of doing its arithmetic, and of asking for them, after one launch.
    """
    moved = traffic(program)
    read, written = _at(moved.read_bytes, hints), _at(moved.written_bytes, hints)
    merged = merge_axes(program)
    wasted = _at(_unread_bytes(merged), hints)
    work = _at(moved.flops, hints) + TRANSCENDENTAL_FLOPS * _at(moved.transcendentals, hints)
    work = max(work, _FLOPS_OF_A_WORD * _at(_words(merged), hints))
    rate = device.hbm_bytes_per_s
    programs = _most_programs(merged, device, hints)
    if programs is not None:
        rate = min(rate, programs * BURST * rate / device.sm_count)
    return device.launch_s + max((read + written + wasted) / rate, work / device.vector_flops)


def _most_programs(merged: TileProgram, device: Device, hints: Mapping[str, int]) -> int | None:
    """Programs of a kernel that has few, because what it stores along its rows waits for their
    reductions; None where there are enough, or it would be cut into parts.
    """
    kinds = {(op.kind, op.over) for op in merged.ops if op.kind in ("reduce", "scan")}
    rows = points(merged.parallel, hints)
    if not kinds or ("reduce", "parallel") in kinds or rows >= device.sm_count * _MOST_SIDE_BY_SIDE:
        return None
    if can_split(merged):
        return None
    return -(-rows // choose(merged, device, hints).x_block)


def _words(merged: TileProgram) -> Size:
    """Instructions of threads that read or write: what a kernel computes again from elements that
    lie apart, it asks for one by one, if only from a cache.
    """
    asked: Size = 0
    for position, op in enumerate(merged.ops):
        if op.kind not in ("load", "store") or op.index is None:
            continue
        names = merged.varies[position] | set(op.index.names)
        # a thread has a point of each direction: what differs along one axis of a direction is
        # asked for at all points of it
        directions = [axes for axes in (merged.parallel, merged.reduced) if names & _names(axes)]
        points = product([a.size for axes in directions for a in axes])
        beside = [a.size for a in merged.axes if op.index.coefficient(a.name) == 1]
        most = max(_WORD_BYTES // op.dtype.itemsize, 1)
        wide = min([most, *(n for n in beside if isinstance(n, int))]) if beside else 1
        asked = asked + points / max(wide, 1)
    return asked


def _names(axes: tuple[Axis, ...]) -> set[str]:
    return {a.name for a in axes}


def _unread_bytes(merged: TileProgram) -> Size:
    """Bytes that come along unasked: in a kernel whose reductions read along rows, whatever runs
    down the columns moves a sector an element, and the other way round.
    """
    if not any(op.kind in ("reduce", "scan") for op in merged.ops):
        return 0
    reduced = _names(merged.reduced)
    along_rows = rows_contiguous(merged)
    wasted: Size = 0
    for op in merged.ops:
        if op.kind not in ("load", "store") or op.index is None:
            continue
        names = set(op.index.axes)
        contiguous = [n for n in names if op.index.coefficient(n) == 1]
        both_ways = names & reduced and names - reduced
        if both_ways and contiguous and (contiguous[0] in reduced) != along_rows:
            points = product([a.size for a in merged.axes if a.name in names])
            wasted = wasted + points * (_SECTOR_BYTES - op.dtype.itemsize)
    return wasted


def _at(size: Size, hints: Mapping[str, int]) -> float:
    if isinstance(size, (int, float)):
        return float(size)
    return float(size.subs({s: hints.get(s.name, 1024) for s in size.free_symbols}))
