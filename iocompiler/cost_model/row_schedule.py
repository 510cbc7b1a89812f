"""How rows are walked whose columns are summed too: the backward of a norm, in one pass.

Each program walks its share of the rows and leaves a row of partial sums, which a second kernel
reads again (`tile/rows.py`). More programs hide each other's waits and leave more of these rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from iocompiler.cost_model.device import Device
from iocompiler.cost_model.tiles import (
    FIXED_REGISTERS,
    REGISTERS,
    across_tile,
    at_hint,
    fits_ahead,
    points,
    tile_loads,
    warps_for,
)
from iocompiler.plan.data import Schedule
from iocompiler.tile.arrange import merge_axes
from iocompiler.tile.index import power_of_two, product
from iocompiler.tile.program import TileProgram
from iocompiler.tile.rows import column_reductions, folded_bytes, reads_again
from iocompiler.tile.traffic import traffic

_CROWDED = 0.7
# Operations on each element in the backward of a layer norm, and one more.
_MAPS_OF_A_NORM = 10
# Of the bytes that two programs a multiprocessor move, the share that one must do with. Over 4096
# rows of 4096 elements a layer norm's backward takes 0.91 of the time by one, of 2048 as long, of
# 1024 and 768 half as long again. Those of BERT-large's layer, which hold much, are faster by
# one: its step takes 0.774 of Inductor's time, for 0.793 (H100).
_ALONE = 0.95


def row_programs(program: TileProgram, device: Device, hints: Mapping[str, int]) -> int:
    """How many programs walk the rows of a program with column sums, each with a partial row."""
    return row_schedule(merge_axes(program), device, hints).programs


def row_schedule(program: TileProgram, device: Device, hints: Mapping[str, int]) -> Schedule:
    """As many programs as run at once: two a multiprocessor, which hide each other's waits, or one
    of twice the rows and warps, where half the partial rows are worth more. Programs that store
    theirs already are as many as those.
    """
    two = _walk(program, device, hints, 2)
    if not _fits_beside(program, two, device):
        two = one = _walk(program, device, hints, 1)
    else:
        one = _walk(program, device, hints, 1, times=2)
    stored = _stored_rows(program)
    if stored:
        return replace(two if stored > device.sm_count else one, programs=stored)
    if two.programs <= device.sm_count:
        return one
    most, least = (_walked_bytes(program, each.programs, hints) for each in (two, one))
    # where no loads are in flight, a multiprocessor waits whenever its only program does; and where
    # a thread has many elements of several rows, their reductions wait for each other
    ready = one.num_stages > 2 and (two.x_block == 1 or _holds_much(program))
    return one if ready and least < _ALONE * most else two


def _walk(
    program: TileProgram, device: Device, hints: Mapping[str, int], beside: int, times: int = 1
) -> Schedule:
    """A walk by ``beside`` programs a multiprocessor, of ``times`` the rows at once; of few rows
    by fewer, each of which has some.
    """
    width = product([a.size for a in program.reduced])
    assert isinstance(width, int), "a row with column sums has a static length"
    block = power_of_two(width)
    tile, each = (2048, 16) if _holds_much(program) else (4096, 32)
    x = max(1, min(tile // block, 16))
    warps = warps_for(x * times * block, each if x * block <= tile else 32)
    programs, rows = beside * device.sm_count, max(1, points(program.parallel, hints))
    x = min(x * times, power_of_two(-(-rows // programs)))
    programs = min(programs, -(-rows // x))
    schedule = Schedule("rows", x, r_block=block, num_warps=warps, num_stages=1, programs=programs)
    # weights are counted too: where they are not kept, they are read ahead as the rows are
    loads = sum(tile_loads(program)) + sum(_weights(program))
    fits = fits_ahead(schedule, loads, device, beside * device.sm_count)
    if fits and not reads_again(program) and not _crowded(program, x * block, warps, device):
        return replace(schedule, num_stages=3)
    return schedule


def _fits_beside(program: TileProgram, schedule: Schedule, device: Device) -> bool:
    """Whether a multiprocessor has the registers of two programs; else one of them runs after the
    other, and only adds a partial row.
    """
    threads = 32 * schedule.num_warps
    each = -(-schedule.x_block * schedule.r_block // threads)
    held = FIXED_REGISTERS + each * (len(tile_loads(program)) + kept_words(program))
    return 2 * threads * min(held, REGISTERS[-1]) <= device.registers_per_sm


def kept_words(program: TileProgram) -> int:
    """What a program that walks rows keeps for each of their columns: its sum, and what is the same
    for every row.
    """
    return len(column_reductions(program)) + len(_weights(program))


def _stored_rows(program: TileProgram) -> int:
    """The partial rows a program stores; 0 where its column sums are not split yet."""
    width = product([a.size for a in program.reduced])
    stores = [op.buffer for op in program.ops if op.fn == "partial"]
    return at_hint(program.buffer(stores[0]).elements, {}) // at_hint(width, {}) if stores else 0


def _walked_bytes(program: TileProgram, programs: int, hints: Mapping[str, int]) -> int:
    """Bytes to and from memory, those of the partial rows, which are read again, among them."""
    row = points(program.reduced, hints) * folded_bytes(program, "parallel")
    return at_hint(traffic(program).bytes, hints) + 2 * programs * row


def _holds_much(program: TileProgram) -> bool:
    """Whether more is computed for each element than the backward of a norm is: dropout, the
    gradient that goes around it, an activation's. Half the rows at once then spill nothing, and are
    up to a fifth faster (BERT's and GPT-2's, H100).
    """
    return len(across_tile(program, "map")) > _MAPS_OF_A_NORM


def _crowded(program: TileProgram, elements: int, warps: int, device: Device) -> bool:
    """Whether a row that waits for its reductions, beside the sums down the columns, leaves too few
    registers for the rest: loads in flight only add to the spills (layer norm backward at 16384).
    """
    each = elements / (32 * warps)
    held = sum(op.kind == "reduce" for op in program.ops)
    most = min(REGISTERS[-1], device.registers_per_sm // (32 * warps))
    return held * each > _CROWDED * most


def _weights(program: TileProgram) -> list[int]:
    """Bytes of an element of each load that is the same for every row and differs along it."""
    reduced = {a.name for a in program.reduced}
    return [
        op.dtype.itemsize
        for position, op in enumerate(program.ops)
        if op.kind == "load" and program.varies[position] and program.varies[position] <= reduced
    ]
