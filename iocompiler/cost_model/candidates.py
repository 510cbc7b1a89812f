"""Schedules worth measuring for a tile program: the chosen one and its legal neighbours.

A neighbour differs in block sizes, in warps, in holding the reduced extent in registers rather
than walking it; over many tensors, in a bound of registers or in walking all blocks with few
programs. Those a rough model of occupancy expects to be clearly slower are left out; the model only
prunes, a clock decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from iocompiler.cost_model.device import Device
from iocompiler.cost_model.kernel import kernel_seconds
from iocompiler.cost_model.row_schedule import kept_words
from iocompiler.cost_model.schedule import choose
from iocompiler.cost_model.tiles import FIXED_REGISTERS, REGISTERS, points
from iocompiler.plan.data import Schedule
from iocompiler.tile.arrange import merge_axes, pointwise_tiling, rows_contiguous
from iocompiler.tile.flat import is_flat
from iocompiler.tile.index import power_of_two, product
from iocompiler.tile.online import levels
from iocompiler.tile.program import TileProgram

MOST = 8
_WARPS = (1, 2, 4, 8, 16, 32)
_LARGEST_TILE = 1 << 15
_SHORTEST_PIECE = 256
# what a load waits for when the memory is busy; times the bandwidth, the bytes to have in flight
_LATENCY_S = 8e-7
_WARPS_OF_AN_SM = 64
_BLOCKS_OF_AN_SM = 32
# programs of a multiprocessor that walk many tensors: from no more than run at once to many more,
# so that a program that is done early leaves its place to another
_WALKING = (8, 32, 128)
# registers of a thread that leave room for 32 warps on a multiprocessor
_BOUND = 64
# a neighbour modeled this much slower than the chosen schedule is not measured
_SLOWER = 1.3
# each doubling away from the chosen schedule must promise this much
_STEP = 1.1


def candidates(
    program: TileProgram,
    device: Device,
    hints: Mapping[str, int] | None = None,
    most: int = MOST,
    first: Schedule | None = None,
) -> list[Schedule]:
    """At most ``most`` schedules, the chosen one first: ``first``, or what `choose` says.

    All are legal for every value of symbolic sizes. Where a program stores partial rows, their
    buffers fix the number of programs, and it stays.
    """
    hints = hints or {}
    first = first or choose(program, device, hints)
    space = _Space(merge_axes(program), device, hints)
    limit = _SLOWER * space.seconds(first)
    others = {s for s in space.neighbours(first) if space.fits(s)} - {first}
    ranked = sorted(others, key=lambda s: (space.seconds(s) * _STEP ** _distance(s, first), str(s)))
    near = [s for s in ranked if _way(s) == _way(first) and space.seconds(s) <= limit]
    # the model is least sure of how a row is held: the best of every other way is always measured
    others_best = {_way(s): s for s in reversed(ranked) if _way(s) != _way(first)}
    kept = near[: most - 1 - len(others_best)] + list(others_best.values())
    kept += [s for s in ranked if s not in kept and space.seconds(s) <= limit]
    return [first, *kept[: most - 1]]


def _way(schedule: Schedule) -> tuple[str, bool]:
    """How the kernel goes about its work."""
    return schedule.kind, schedule.programs > 0


def walks_rows(program: TileProgram) -> bool:
    """Whether any number of programs may walk the rows of a merged program, each held whole."""
    if not program.reduced or not isinstance(product([a.size for a in program.reduced]), int):
        return False
    if _stores_partial_rows(program) or _writes_in_place(program):
        return False
    return not any(op.kind == "scan" for op in program.ops) and rows_contiguous(program)


def _writes_in_place(program: TileProgram) -> bool:
    return any(b.role == "inout" for b in program.buffers)


def _stores_partial_rows(program: TileProgram) -> bool:
    return any(op.fn == "partial" for op in program.ops)


def _distance(a: Schedule, b: Schedule) -> float:
    """Doublings between two schedules; another way counts as one, its blocks then not at all."""
    pairs = [(a.num_warps, b.num_warps), (a.x_block, b.x_block), (a.y_block, b.y_block)]
    if _way(a) == _way(b):
        pairs += [(a.r_block, b.r_block), (max(a.programs, 1), max(b.programs, 1))]
    steps = float(_way(a) != _way(b))
    return steps + sum(abs(math.log2(one / other)) for one, other in pairs)


@dataclass(frozen=True)
class _Space:
    """A merged program and where it runs."""

    program: TileProgram
    device: Device
    hints: Mapping[str, int]

    # --- the neighbours

    def neighbours(self, first: Schedule) -> Iterator[Schedule]:
        if is_flat(self.program):  # of the body with a mask, what runs rarely, needs most registers
            yield replace(first, registers=_BOUND)
        for shape in self._shapes(first):
            for warps in _WARPS:
                yield replace(shape, num_warps=warps, registers=0)
                bound = first.registers * first.num_warps // warps  # as many programs a processor
                if bound in REGISTERS:
                    yield replace(shape, num_warps=warps, registers=bound)

    def _shapes(self, first: Schedule) -> Iterator[Schedule]:
        for base in (first, *self._other_kind(first)):
            ahead = base.kind == "rows" and base.num_stages > 2
            for x in _around(base.x_block):
                for y in _around(base.y_block) if base.y_block > 1 else (base.y_block,):
                    yield replace(base, x_block=x, y_block=y)
                if ahead:
                    yield replace(base, x_block=x, num_stages=base.num_stages + 1)
            if ahead:
                yield replace(base, num_stages=1)  # loads in flight may cost registers that spill
            if base.kind == "rows" and not _stores_partial_rows(self.program):
                for each in (1, 2, 4):
                    yield replace(base, programs=each * self.device.sm_count)
            if is_flat(self.program):
                yield from self._walking(base)
            if base.kind == "looped":
                for r in _around(base.r_block):
                    yield replace(base, r_block=r)
                    yield replace(base, r_block=r, x_block=max(1, base.x_block * base.r_block // r))

    def _walking(self, base: Schedule) -> Iterator[Schedule]:
        """Few programs for all blocks of many tensors, each with two blocks or more."""
        for x in (base.x_block, 2 * base.x_block):
            for each in _WALKING:
                programs = each * self.device.sm_count
                if 2 * programs * x <= points(self.program.parallel, self.hints):
                    yield replace(base, x_block=x, programs=programs)

    def _other_kind(self, first: Schedule) -> Iterator[Schedule]:
        """A row held by a program of its own, held by one that walks many rows, and walked."""
        width = product([a.size for a in self.program.reduced])
        if (
            not self.program.reduced
            or not isinstance(width, int)
            or _stores_partial_rows(self.program)
        ):
            return
        whole = replace(first, kind="persistent", r_block=power_of_two(width), programs=0)
        if first.kind == "looped":
            yield replace(whole, x_block=1)
        if first.kind != "persistent":
            yield whole
        many = points(self.program.parallel, self.hints) > 4 * self.device.sm_count
        if first.kind != "rows" and many and walks_rows(self.program):
            yield replace(whole, kind="rows", x_block=1, programs=2 * self.device.sm_count)
        # a walk reads again what it has already written in place
        if first.kind != "looped" and not _writes_in_place(self.program):
            for piece in (1024, 2048, 4096):
                if _SHORTEST_PIECE <= piece < first.r_block:
                    yield replace(whole, kind="looped", r_block=piece)

    # --- what is pruned

    def fits(self, schedule: Schedule) -> bool:
        tile = _tile(schedule)
        each = tile / (32 * schedule.num_warps)
        if tile > _LARGEST_TILE or (each < 1 and schedule.num_warps > 1):
            return False
        # the compiler may order loads so that fewer values live at once, unless a row is held
        slack = 1.25 if schedule.kind in ("persistent", "rows") else 2
        most = min(REGISTERS[-1], self.device.registers_per_sm // (32 * schedule.num_warps))
        most = min(most, schedule.registers or most)
        if self._registers(schedule) > slack * most:
            return False
        return schedule.x_block <= self._widest(schedule) and self._reads_whole_lines(schedule)

    def _widest(self, schedule: Schedule) -> int:
        """The block along x beyond which a tile is mostly mask."""
        axes = self.program.parallel
        if schedule.kind == "pointwise":
            axes = pointwise_tiling(self.program).x
        return power_of_two(points(axes, self.hints))

    def _reads_whole_lines(self, schedule: Schedule) -> bool:
        """A column reduction reads along x: eight elements are the least that is no waste."""
        if not self.program.reduced or schedule.kind == "rows" or rows_contiguous(self.program):
            return True
        return schedule.x_block >= min(8, self._widest(schedule))

    # --- the rough model

    def seconds(self, schedule: Schedule) -> float:
        """The kernel's roofline time, longer where too few bytes are in flight or the last programs
        run alone.
        """
        device = self.device
        registers = min(self._registers(schedule), schedule.registers or REGISTERS[-1])
        resident = min(_WARPS_OF_AN_SM, device.registers_per_sm // int(32 * registers))
        blocks = max(1, min(resident // schedule.num_warps, _BLOCKS_OF_AN_SM))
        programs = self._programs(schedule)
        slots = min(programs, blocks * device.sm_count)
        ahead = schedule.num_stages - 1 if schedule.kind == "rows" else 1
        flying = slots * _tile(schedule) * self._point_bytes * max(1, ahead)
        everything = points(self.program.axes, self.hints) * self._point_bytes
        share = min(1.0, flying / min(_LATENCY_S * device.memory_rate, max(everything, 1)))
        waves = programs / slots
        tail = math.ceil(waves) / waves
        return (
            kernel_seconds(self.program, device, self.hints)
            * self._passes(schedule)
            * tail
            / max(share, 1e-3)
        )

    def _programs(self, schedule: Schedule) -> int:
        if schedule.programs:
            return schedule.programs
        across = points(self.program.parallel, self.hints)
        return max(1, -(-across // (schedule.x_block * schedule.y_block)))

    def _registers(self, schedule: Schedule) -> float:
        each = max(1.0, _tile(schedule) / (32 * schedule.num_warps))
        return FIXED_REGISTERS + each * self._words_held(schedule)

    def _words_held(self, schedule: Schedule) -> float:
        """32-bit words a point of the tile holds: what is loaded (widened, where it is reduced),
        and what a walk over rows keeps.
        """
        if not self.program.reduced:
            return self._point_bytes / 4
        words = max(1, len(self._wide_loads))
        if schedule.kind != "rows":
            return words
        return words + kept_words(self.program)

    def _passes(self, schedule: Schedule) -> float:
        """How often a walk reads its row; a row read again comes from L2 in good part."""
        if schedule.kind != "looped":
            return 1.0
        level = levels(self.program)
        reductions = [level[i] - 1 for i, op in enumerate(self.program.ops) if op.kind == "reduce"]
        last = max(reductions + self._wide_store_levels(level), default=0)
        return 1 + last * self.device.memory_rate / self.device.l2_bytes_per_s / 2

    def _wide_store_levels(self, level: list[int]) -> list[int]:
        reduced = {a.name for a in self.program.reduced}
        return [
            level[i]
            for i, op in enumerate(self.program.ops)
            if op.kind == "store" and self.program.varies[i] & reduced
        ]

    @cached_property
    def _wide_loads(self) -> tuple[int, ...]:
        """Bytes of an element of each load that differs at every point of the tile."""
        varies, ops = self.program.varies, self.program.ops
        widest = max((len(v) for v in varies), default=0)
        return tuple(
            op.dtype.itemsize
            for i, op in enumerate(ops)
            if op.kind == "load" and len(varies[i]) == widest
        )

    @property
    def _point_bytes(self) -> int:
        return max(1, sum(self._wide_loads))


def _tile(schedule: Schedule) -> int:
    return schedule.x_block * schedule.y_block * schedule.r_block


def _around(block: int) -> tuple[int, ...]:
    """A block size, and up to two doublings either way."""
    return tuple(block * n for n in (1, 2, 4)) + tuple(block // n for n in (2, 4) if block >= n)
