"""Which schedule a tile program gets on a device, from its shape and its accesses alone.

The rules say what a memory-bound kernel needs: enough bytes in flight on every multiprocessor,
neighbouring threads on neighbouring addresses, and a row that fits the registers where its
reductions are read twice. Block sizes follow measurements on an H200 (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from iocompiler.cost_model.device import Device
from iocompiler.cost_model.row_schedule import row_schedule
from iocompiler.cost_model.tiles import (
    FIXED_REGISTERS,
    at_hint,
    fits_ahead,
    points,
    tile_loads,
    warps_for,
)
from iocompiler.plan.data import Schedule
from iocompiler.tile.arrange import merge_axes, pointwise_tiling, rows_contiguous
from iocompiler.tile.index import power_of_two, product
from iocompiler.tile.program import TileProgram
from iocompiler.tile.rows import column_reductions

LONGEST_PERSISTENT_ROW = 16384
# A reduction this low is done at once by a program of few columns.
_LOW_REDUCTION = 1024
# A row from which weights read anew for every row weigh as much as the row.
_LONG_ROW = 8192
# Columns of a scan: as many as fill a memory line in half precision, and a sector.
_LINE_COLUMNS, _FEWEST_COLUMNS = 64, 16
# Elements a program scans at once.
_SCANNED = 2048


def choose(
    program: TileProgram, device: Device, hints: Mapping[str, int] | None = None
) -> Schedule:
    """The schedule expected to be fastest: legal for every value of symbolic sizes, which ``hints``
    only steer.
    """
    hints = hints or {}
    merged = merge_axes(program)
    if column_reductions(program):
        return row_schedule(merged, device, hints)
    # a reduction of a single element has no axis, and is one all the same
    if not program.reduced and not any(op.kind in ("reduce", "scan") for op in program.ops):
        return _pointwise(merged, device, hints)
    if rows_contiguous(merged):
        return _row_reduction(merged, device, hints)
    if any(op.kind == "scan" for op in program.ops):
        return _column_scan(merged, device, hints)
    return _column_reduction(merged, device, hints)


# --- pointwise


def _pointwise(program: TileProgram, device: Device, hints: Mapping[str, int]) -> Schedule:
    tiling = pointwise_tiling(program)
    if tiling.y is not None:
        x = min(64, power_of_two(at_hint(tiling.x[0].size, hints)))
        y = min(64, power_of_two(at_hint(tiling.y.size, hints)))
        return Schedule(
            "pointwise", x_block=max(x, 1), y_block=max(y, 1), num_warps=warps_for(x * y, 16)
        )
    total = points(program.parallel, hints)
    block = 1024
    while block > 128 and total < block * device.sm_count * 2:
        block //= 2
    return Schedule("pointwise", x_block=block, num_warps=warps_for(block, 8))


# --- rows


def _row_reduction(program: TileProgram, device: Device, hints: Mapping[str, int]) -> Schedule:
    width = product([a.size for a in program.reduced])
    rows = points(program.parallel, hints)
    if isinstance(width, int) and width <= LONGEST_PERSISTENT_ROW:
        block = power_of_two(width)
        x = max(1, min(2048 // block, power_of_two(rows), 64))
        draws = block >= _LONG_ROW and any(op.kind == "rand" for op in program.ops)
        warps = warps_for(x * block, 64 if draws and block > _LONG_ROW else 16)
        schedule = Schedule("persistent", x_block=x, r_block=block, num_warps=warps)
        weighted = _rereads_much(program)
        if not draws and not weighted:
            return schedule
        # random numbers are long chains of arithmetic, weights a wait for L2: other programs of
        # the multiprocessor go on meanwhile, if registers are left for them
        held = _held(program, block // (32 * warps))
        beside = max(2, device.registers_per_sm // (32 * warps * held))
        shared = device.registers_per_sm // (32 * warps * beside) // 8 * 8
        if held <= shared:
            return replace(schedule, registers=shared)
        if weighted:
            piece = min(4096, block // 4)
            return Schedule("looped", x_block=1, r_block=piece, num_warps=warps_for(piece, 8))
        return schedule
    block = min(4096, max(64, power_of_two(at_hint(width, hints))))
    x = max(1, min(2048 // block, power_of_two(rows)))
    return Schedule("looped", x_block=x, r_block=block, num_warps=warps_for(x * block, 8))


def _rereads_much(program: TileProgram) -> bool:
    """Whether a long row needs as many bytes that are the same for every row (weights) as its own.

    A multiprocessor with one program would wait for those bytes from L2; several hide each other's
    waits.
    """
    width = product([a.size for a in program.reduced])
    if not isinstance(width, int) or width < _LONG_ROW:
        return False
    reduced = {a.name for a in program.reduced}
    same = own = 0
    for position, op in enumerate(program.ops):
        if op.kind in ("load", "store") and op.index is not None and reduced & set(op.index.names):
            if program.varies[position] <= reduced and op.kind == "load":
                same += op.dtype.itemsize
            else:
                own += op.dtype.itemsize
    return same >= own > 0


def _held(program: TileProgram, each: int) -> int:
    """Registers of a thread that holds ``each`` elements of a row, of what it reads as it lies in
    memory, or of what it makes of that in float32.
    """
    return FIXED_REGISTERS + each * max(4, sum(tile_loads(program))) // 4


# --- columns


def _column_reduction(
    program: TileProgram, device: Device, hints: Mapping[str, int], widest: bool = False
) -> Schedule:
    """Columns side by side: as many a program as fill memory lines; fewer where a low reduction
    has few programs. (A high one is split instead: ``widest`` is what `split_factor` starts from.)
    """
    width = points(program.parallel, hints)
    height = product([a.size for a in program.reduced])
    x = min(128, power_of_two(width))
    low = at_hint(height, hints) <= _LOW_REDUCTION and not widest
    # tall tiles keep more loads in flight, low ones leave no lane idle
    elements = 4096 if low else 8192
    while low and x > 8 and -(-width // x) < device.sm_count:
        x //= 2
    r = max(1, min(elements // x, power_of_two(at_hint(height, hints))))
    warps = warps_for(x * r, 16 if low else 32)
    schedule = Schedule("looped", x_block=x, r_block=r, num_warps=warps)
    if isinstance(height, int) and power_of_two(height) <= r:
        return replace(schedule, kind="persistent", r_block=power_of_two(height))
    loads = tile_loads(program)
    small = replace(schedule, x_block=min(x, 64), r_block=min(r, 32), num_warps=4, num_stages=3)
    if x >= 64 and len(loads) > 1 and fits_ahead(small, sum(loads), device, 2 * device.sm_count):
        return small  # a tile computed from several tensors: small ones, the next on their way
    return schedule


def _column_scan(program: TileProgram, device: Device, hints: Mapping[str, int]) -> Schedule:
    """A memory line of columns side by side, fewer where there are few programs; it walks down."""
    width = points(program.parallel, hints)
    x = min(_LINE_COLUMNS, power_of_two(width))
    while x > _FEWEST_COLUMNS and -(-width // x) < device.sm_count:
        x //= 2
    height = at_hint(product([a.size for a in program.reduced]), hints)
    r = max(1, min(_SCANNED // x, power_of_two(height)))
    return Schedule("looped", x_block=x, r_block=r, num_warps=warps_for(x * r, 16))


# --- reductions with few results


def split_factor(
    program: TileProgram, device: Device, hints: Mapping[str, int] | None = None
) -> int:
    """How many parts a reduction with few results should be cut into; 1 where it fills the device
    as it is.
    """
    hints = hints or {}
    merged = merge_axes(program)
    if not merged.reduced:
        return 1
    by_column = not rows_contiguous(merged) and not any(op.kind == "scan" for op in merged.ops)
    schedule = (
        _column_reduction(merged, device, hints, widest=True)
        if by_column
        else choose(program, device, hints)
    )
    programs = -(-points(merged.parallel, hints) // schedule.x_block)
    depth = points(merged.reduced, hints)
    wanted = 4 * device.sm_count
    if programs >= device.sm_count or depth * points(merged.parallel, hints) < 1 << 16:
        return 1
    deepest = at_hint(merged.reduced[0].size, hints)
    beside = min(points(merged.parallel, hints), schedule.x_block)
    least = max(1, 4096 * deepest // max(depth * beside, 1))
    return max(1, min(wanted // max(programs, 1), deepest // max(least, 1)))
