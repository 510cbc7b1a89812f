"""Which tile the matmul template gets, from the shape of its products and the device alone.

A multiprocessor works through its share of the tiles. A step of the inner extent takes as long as
the slowest of its matrix units, of its part of L2's bandwidth and of waiting for the loads in
flight; around the steps of a tile stand the first loads and the epilogue, hidden where a second
tile is resident. The model only has to rank tiles: `candidates` are measured under max-autotune,
and `python -m benchmarks.matmul` shows how far the choice is from the best.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from iocompiler.cost_model.cost import value_of
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.matmul import epilogue_traffic, is_aligned
from iocompiler.cost_model.roofline import BURST, TRANSCENDENTAL_FLOPS
from iocompiler.plan.column_sums import rows_of_part
from iocompiler.plan.product import MatmulTile, Product
from iocompiler.tile.program import TileProgram

MOST = 8
_BLOCKS = (16, 32, 64, 128, 256)
_DEPTHS = (32, 64, 128)
_STAGES = (2, 3, 4, 5)
_WARPS = (4, 8)
# what a load waits for when the memory is busy: as in `candidates.py`
_LATENCY_S = 8e-7
# elements that a thread may load one by one in a step: each has an address
_MOST_LOADED = 32
# 32-bit registers of a thread: those that hold sums at most, and those that hold all else
_LEAST_SUMS, _MOST_SUMS = 2, 128
_OTHER_REGISTERS = 56
# columns of a part of an epilogue; and how many tensors beside the sums are many
_LEAST_PART, _MANY_ACCESSES = 16, 3
_MOST_REGISTERS = 255
_WARPS_OF_AN_SM = 64
# of a multiprocessor's shared memory, what is left for a block's barriers and for the epilogue
_SHARED_APART = 1024
# The share of the matrix units' rate that a tile reaches, by its narrower side; and Hopper's where
# sums are less than 256 columns wide. These and the two below are from 24 launches on an H100, six
# tiles each (`benchmarks/matmul.py --part inputs`)
_NARROW = {16: 0.3, 32: 0.55, 64: 0.8}
_HALF_WIDE, _WIDEST = 0.92, 256
# making a descriptor, at the start of a program: all but the first, which the launch hides
_DESCRIPTOR_S = 1e-6
# of the matrix units' rate on Hopper, what is left where threads compute addresses beside them
_BY_POINTERS = 0.97
# of their rate, what the instructions of the generation before reach on Hopper
_OLD_UNITS = 0.6
# what the threads of a tile wait for each other in a step
_MEETING_S = 4e-8
# each further tile of a shape must promise this much
_AGAIN = 1.1

# float32 is no work for the matrix units: operands are in registers
_LARGEST_FLOAT32 = 64 * 64


def choose(
    made: Product, program: TileProgram, device: Device, hints: Mapping[str, int] | None = None
) -> MatmulTile:
    """The tile expected to be fastest: legal for every value of symbolic sizes."""
    return candidates(made, program, device, hints, most=1)[0]


def candidates(
    made: Product,
    program: TileProgram,
    device: Device,
    hints: Mapping[str, int] | None = None,
    most: int = MOST,
) -> list[MatmulTile]:
    """At most ``most`` tiles, the one expected to be fastest first.

    The model is surest of which shapes are good: a further tile of a shape that is listed already
    must promise more.
    """
    space = Space(made, program, device, hints or {})
    left = [(space.seconds(tile), tile) for tile in space.legal()]
    listed: Counter[tuple[int, int, str]] = Counter()
    found: list[MatmulTile] = []
    while left and len(found) < most:
        promises = [seconds * _AGAIN ** listed[_shape(tile)] for seconds, tile in left]
        least = min(promises)
        ties = [each for each, promise in zip(left, promises, strict=True) if promise == least]
        best = min(ties, key=lambda tie: (tie[0], _unusual(tie[1]), str(tie[1])))
        left.remove(best)
        listed[_shape(best[1])] += 1
        found.append(best[1])
    return found


def units_share(tile: MatmulTile, rights: int, *, hopper: bool) -> float:
    """Of the matrix units' rate, what a tile of products with so many right operands reaches at
    most.
    """
    full = _HALF_WIDE if hopper and tile.n * rights < _WIDEST else 1.0
    return _NARROW.get(min(tile.m, tile.n), full)


def _shape(tile: MatmulTile) -> tuple[int, int, str]:
    return tile.m, tile.n, tile.loads


def _unusual(tile: MatmulTile) -> tuple[bool, int]:
    """Of equal tiles, what most products like best comes first."""
    return tile.programs > 0 and tile.loads == "pointers", abs(tile.num_stages - 4)


@dataclass(frozen=True)
class Space:
    """Products with an epilogue, and where they are computed."""

    made: Product
    program: TileProgram
    device: Device
    hints: Mapping[str, int]

    # --- which tiles there are

    def legal(self) -> Iterator[MatmulTile]:
        """Every tile whose sums fit the registers and whose loads fit the shared memory; parts of
        column sums lie in one.
        """
        sizes = [each.sizes[:3] for each in self._launched]
        m, n, k = (max(extents) for extents in zip(*sizes, strict=True))
        part = rows_of_part(self.program)
        for rows in (block for block in _around(_BLOCKS, m) if block % part == 0):
            for columns in _around(_BLOCKS, n):
                for depth in _around(_DEPTHS, k):
                    for warps in _WARPS:
                        for stages in _STAGES:
                            tile = MatmulTile(rows, columns, depth, warps, stages)
                            yield from self._ways(tile)

    def _ways(self, tile: MatmulTile) -> Iterator[MatmulTile]:
        sums = self._sums(tile)
        if not _LEAST_SUMS <= sums <= self._most_sums or self._shared(tile) > self._shared_there:
            return
        if self._is_vector and tile.m * tile.n > _LARGEST_FLOAT32:
            return
        if not self._is_aligned and self._loaded(tile) > _MOST_LOADED:
            return
        tile = replace(tile, parts=min(self._parts(sums), tile.n // _LEAST_PART))
        yield tile
        programs = self.device.sm_count * self.resident(tile)
        if self._takes_descriptors:
            moved = replace(tile, loads="descriptors", programs=programs)
            if self._shared(moved) <= self._shared_there:
                yield moved
        # two sums leave no register for the walk
        if len(self.made.rights) == 1 and self.tiles(tile) > programs:
            yield replace(tile, programs=programs)

    def _parts(self, sums: int) -> int:
        """What the epilogue loads and makes stands beside the sums: the more, the smaller parts."""
        parts = 2 if sums > _MOST_SUMS // 2 else 1
        return 2 * parts if self._most_accesses >= _MANY_ACCESSES else parts

    @cached_property
    def _most_accesses(self) -> int:
        return max(each._wide_accesses for each in self._launched)

    @cached_property
    def _wide_accesses(self) -> int:
        """Tensors as large as the product that the epilogue loads and stores."""
        program = self.program
        sums = {buffer.name for buffer in program.buffers[: len(self.made.rights)]}
        axes = {axis.name for axis in program.axes}
        return sum(
            op.kind in ("load", "store") and op.buffer not in sums and program.varies[place] == axes
            for place, op in enumerate(program.ops)
        )

    @cached_property
    def _most_sums(self) -> int:
        """Less where operands, or addresses that cannot be told from each other, take registers."""
        pair = len(self.made.rights) > 1 and not self._is_hopper
        return _MOST_SUMS // 2 if pair or not self._is_aligned else _MOST_SUMS

    @cached_property
    def _is_aligned(self) -> bool:
        return is_aligned(self.made)

    @cached_property
    def _shared_there(self) -> int:
        return self.device.shared_bytes_per_sm - _SHARED_APART

    @cached_property
    def _is_vector(self) -> bool:
        return self.made.dtype == torch.float32

    @cached_property
    def _takes_descriptors(self) -> bool:
        half = self.made.dtype in (torch.bfloat16, torch.float16)
        return half and self._is_hopper and self.made.takes_descriptors

    @cached_property
    def _is_hopper(self) -> bool:
        return self.device.capability is not None and self.device.capability >= (9, 0)

    # --- what a tile takes

    def _sums(self, tile: MatmulTile) -> int:
        """Registers of a thread that hold sums."""
        return tile.m * tile.n * len(self.made.rights) // (32 * tile.num_warps)

    def _loaded(self, tile: MatmulTile) -> int:
        """Elements a thread loads in a step of the inner extent."""
        lines = tile.m + tile.n * len(self.made.rights)
        return lines * tile.k // (32 * tile.num_warps)

    def _step_bytes(self, tile: MatmulTile) -> int:
        return self._loaded(tile) * 32 * tile.num_warps * self.made.dtype.itemsize

    def _shared(self, tile: MatmulTile) -> int:
        loads, results = tile.num_stages * self._step_bytes(tile), tile.m * tile.n // tile.parts
        if tile.loads == "descriptors":  # the next tile's loads are there while this one is stored
            return loads + results * self.made.dtype.itemsize
        return max(loads, results * 4)

    def resident(self, tile: MatmulTile) -> int:
        """Tiles at once on a multiprocessor."""
        registers = min(_MOST_REGISTERS, self._sums(tile) * 3 // 2 + _OTHER_REGISTERS)
        return max(
            1,
            min(
                self.device.registers_per_sm // (32 * tile.num_warps * registers),
                self._shared_there // (self._shared(tile) + _SHARED_APART),
                _WARPS_OF_AN_SM // tile.num_warps,
            ),
        )

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        made = self.made
        m, n, batch = (max(1, round(value_of(s, self.hints))) for s in (made.m, made.n, made.batch))
        return m, n, sum(self.depths), batch

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """The inner extent of each product of a sum."""
        return tuple(max(1, round(value_of(k, self.hints))) for k in self.made.depths)

    def steps(self, tile: MatmulTile) -> int:
        """Of the inner extents: a step has operands of one product."""
        return sum(-(-k // tile.k) for k in self.depths)

    @cached_property
    def beside(self) -> tuple[Space, ...]:
        """Those of the other products of the launch."""
        return tuple(Space(*other, self.device, self.hints) for other in self.made.beside)

    @cached_property
    def _launched(self) -> tuple[Space, ...]:
        return (self, *self.beside)

    def tiles(self, tile: MatmulTile) -> int:
        m, n, _, batch = self.sizes
        own = batch * -(-m // tile.m) * -(-n // tile.n)
        return own + sum(other.tiles(tile) for other in self.beside)

    # --- how long it takes

    def seconds(self, tile: MatmulTile) -> float:
        """Of the whole product with its epilogue."""
        device, resident, tiles = self.device, self.resident(tile), self.tiles(tile)
        each = -(-tiles // device.sm_count)  # of the busiest multiprocessor
        beside = min(resident, each)
        steps = self.steps(tile)
        filling, once = self._filling(tile), 0.0
        if tile.loads == "descriptors":
            once = self.describing
            if len(self.made.rights) == 1:  # only the first tile of a program waits for its loads
                filling, once = 0.0, filling + once
        # what stands around the steps of one tile is hidden behind those of another
        around = (filling + self._finishing(tile)) / beside
        working = once + each * (steps * self._step(tile, beside) + around)
        return device.launch_s + max(working, self._moving(tile, tiles, device.sm_count * resident))

    @cached_property
    def describing(self) -> float:
        """Seconds until the operands' descriptors are made."""
        made = self.made
        operands = len(made.lefts) + len(made.all_rights) + len(made.beside)
        return (operands - 1) * _DESCRIPTOR_S

    def _step(self, tile: MatmulTile, resident: int) -> float:
        """Seconds of a step of the inner extent, of ``resident`` tiles that share the units."""
        device, rights = self.device, len(self.made.rights)
        flops = 2 * tile.m * tile.n * tile.k * rights
        rate = device.matmul_rate(self.made.dtype) / device.sm_count
        if self._is_hopper and tile.loads == "pointers":
            rate *= _BY_POINTERS
        if self._is_hopper and tile.m < 64:
            rate *= _OLD_UNITS  # the new instructions take 64 rows
        computing = flops / (rate * units_share(tile, rights, hopper=self._is_hopper))
        loaded = self._step_bytes(tile)
        loading = loaded * device.sm_count / device.l2_bytes_per_s
        # of the latency, each resident tile and each stage in flight hides a part
        waiting = _LATENCY_S / (self._in_flight(tile) * resident)
        return max(computing, loading, waiting) + _MEETING_S / resident

    def _in_flight(self, tile: MatmulTile) -> float:
        """Steps whose loads are on their way; Hopper's matrix units still read the step before."""
        return max(tile.num_stages - (2 if self._is_hopper else 1), 0.5)

    def _filling(self, tile: MatmulTile) -> float:
        return (
            _LATENCY_S + self._step_bytes(tile) * self.device.sm_count / self.device.l2_bytes_per_s
        )

    def _finishing(self, tile: MatmulTile) -> float:
        """The epilogue of one tile by itself."""
        moved, work = self.epilogue
        share = tile.m * tile.n / self._elements
        part = moved * share
        device = self.device
        computing = work * share * device.sm_count / device.vector_flops
        moving = part * device.sm_count / (device.memory_rate * BURST)
        return _LATENCY_S + max(computing, moving)

    def _moving(self, tile: MatmulTile, tiles: int, wave: int) -> float:
        """Everything that passes through memory: operands once for each ``wave`` of all ``tiles``
        that needs them, or as often as L2 makes it.
        """
        m, n, k, batch = self.sizes
        size, rights = self.made.dtype.itemsize, len(self.made.rights)
        rows = min(tile.group, -(-m // tile.m))
        columns = min(max(1, wave // rows), -(-n // tile.n))
        waves = max(1.0, tiles / (rows * columns))
        once = batch * (m + n * rights) * k * size
        once += sum(other.sizes[1] * k * size for other in self.beside)
        again = waves * (rows * tile.m + columns * tile.n * rights) * k * size
        operands = once if once <= self.device.l2_bytes else max(once, again)
        others, _ = self.epilogue
        return (operands + others) / self.device.memory_rate

    @cached_property
    def _elements(self) -> int:
        """Of all results of the launch."""
        return sum(each.sizes[0] * each.sizes[1] * each.sizes[3] for each in self._launched)

    @cached_property
    def epilogue(self) -> tuple[float, float]:
        """Bytes and arithmetic of the epilogues of all tiles."""
        moved = epilogue_traffic(self.made, self.program)
        special = TRANSCENDENTAL_FLOPS * value_of(moved.transcendentals, self.hints)
        own = value_of(moved.bytes, self.hints), value_of(moved.flops, self.hints) + special
        others = [other.epilogue for other in self.beside]
        return own[0] + sum(bytes for bytes, _ in others), own[1] + sum(work for _, work in others)


def _around(blocks: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The blocks that are not mostly beyond a size."""
    largest = max(blocks[0], 1 << (size - 1).bit_length())
    return tuple(block for block in blocks if block <= largest)
