"""What schedules of every kind ask: sizes at their hints, a thread's registers, warps, and how much
shared memory holds.
"""

from __future__ import annotations

from collections.abc import Mapping

from iocompiler.cost_model.device import Device
from iocompiler.plan.data import Schedule
from iocompiler.tile.index import Size, power_of_two, product
from iocompiler.tile.program import Op, TileProgram

_DEFAULT_HINT = 1024
# Of a multiprocessor's shared memory, what loads in flight may take; reductions need some too.
_SHARED_FOR_LOADS = 0.87
REGISTERS = range(32, 256)  # of a thread, where a schedule bounds them
FIXED_REGISTERS = 24  # of a thread, for addresses, masks and loop counters


def at_hint(size: Size, hints: Mapping[str, int]) -> int:
    """A size at the hinted values of its symbols."""
    if isinstance(size, int):
        return size
    return int(size.subs({s: hints.get(s.name, _DEFAULT_HINT) for s in size.free_symbols}))


def points(axes: tuple[object, ...], hints: Mapping[str, int]) -> int:
    return at_hint(product([a.size for a in axes]), hints)  # type: ignore[attr-defined]


def warps_for(elements: int, each: int) -> int:
    """Warps for a tile of ``elements`` with about ``each`` elements a thread."""
    return max(1, min(16, power_of_two(max(1, elements // (32 * each)))))


def fits_ahead(schedule: Schedule, bytes_a_point: int, device: Device, programs: int) -> bool:
    """Whether shared memory holds the tiles of two further steps, with so many programs at once."""
    ahead = 2 * schedule.x_block * schedule.r_block * bytes_a_point
    return ahead <= _SHARED_FOR_LOADS * device.shared_bytes_per_sm * device.sm_count // programs


def tile_loads(program: TileProgram) -> list[int]:
    """Bytes of an element of each load that differs along rows and along columns."""
    return [op.dtype.itemsize for op in across_tile(program, "load")]


def across_tile(program: TileProgram, kind: str) -> list[Op]:
    """The operations of a kind that differ along rows and along columns."""
    both = ({a.name for a in program.parallel}, {a.name for a in program.reduced})
    return [
        op
        for position, op in enumerate(program.ops)
        if op.kind == kind and all(program.varies[position] & names for names in both)
    ]
