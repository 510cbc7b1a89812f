"""What a tile of the matmul template takes on a device: registers, shared memory, time.

A multiprocessor works through its share of the tiles. A step of the inner extent takes as long as
the slowest of its matrix units, of its part of L2's bandwidth and of waiting for the loads in
flight; around the steps of a tile stand the first loads and the epilogue, hidden where a second
tile is resident. The model only has to rank tiles (`matmul_tiles.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from iocompiler.cost_model.cost import value_of
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.matmul import epilogue_traffic
from iocompiler.cost_model.roofline import BURST, TRANSCENDENTAL_FLOPS
from iocompiler.plan.product import MatmulTile, Product
from iocompiler.tile.program import TileProgram

# what a load waits for when the memory is busy: as in `candidates.py`
_LATENCY_S = 8e-7
# 32-bit registers of a thread: those that hold no sums, and all there are
_OTHER_REGISTERS, _MOST_REGISTERS = 56, 255
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


def units_share(tile: MatmulTile, rights: int, *, hopper: bool) -> float:
    """Of the matrix units' rate, what a tile of products with so many right operands reaches at
    most.
    """
    full = _HALF_WIDE if hopper and tile.n * rights < _WIDEST else 1.0
    return _NARROW.get(min(tile.m, tile.n), full)


@dataclass(frozen=True)
class Work:
    """Products with an epilogue, and the device they are computed on: what a tile takes there."""

    made: Product
    program: TileProgram
    device: Device
    hints: Mapping[str, int]

    @cached_property
    def is_hopper(self) -> bool:
        return self.device.capability is not None and self.device.capability >= (9, 0)

    @cached_property
    def shared_there(self) -> int:
        """Bytes of a multiprocessor's shared memory that a tile may have."""
        return self.device.shared_bytes_per_sm - _SHARED_APART

    def sums(self, tile: MatmulTile) -> int:
        """Registers of a thread that hold sums."""
        return tile.m * tile.n * len(self.made.rights) // (32 * tile.num_warps)

    def loaded(self, tile: MatmulTile) -> int:
        """Elements a thread loads in a step of the inner extent."""
        lines = tile.m + tile.n * len(self.made.rights)
        return lines * tile.k // (32 * tile.num_warps)

    def _step_bytes(self, tile: MatmulTile) -> int:
        return self.loaded(tile) * 32 * tile.num_warps * self.made.dtype.itemsize

    def shared(self, tile: MatmulTile) -> int:
        """Bytes of shared memory of a tile."""
        loads, results = tile.num_stages * self._step_bytes(tile), tile.m * tile.n // tile.parts
        if tile.loads == "descriptors":  # the next tile's loads are there while this one is stored
            return loads + results * self.made.dtype.itemsize
        return max(loads, results * 4)

    def resident(self, tile: MatmulTile) -> int:
        """Tiles at once on a multiprocessor."""
        registers = min(_MOST_REGISTERS, self.sums(tile) * 3 // 2 + _OTHER_REGISTERS)
        return max(
            1,
            min(
                self.device.registers_per_sm // (32 * tile.num_warps * registers),
                self.shared_there // (self.shared(tile) + _SHARED_APART),
                _WARPS_OF_AN_SM // tile.num_warps,
            ),
        )

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """Rows, columns, the sum of the inner extents, batch."""
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
    def beside(self) -> tuple[Work, ...]:
        """That of each further product of the launch."""
        return tuple(Work(*other, self.device, self.hints) for other in self.made.beside)

    @cached_property
    def launched(self) -> tuple[Work, ...]:
        """That of each product of the launch, the first one's too."""
        return (self, *self.beside)

    def tiles(self, tile: MatmulTile) -> int:
        """How many there are."""
        m, n, _, batch = self.sizes
        own = batch * -(-m // tile.m) * -(-n // tile.n)
        return own + sum(other.tiles(tile) for other in self.beside)

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
        if self.is_hopper and tile.loads == "pointers":
            rate *= _BY_POINTERS
        if self.is_hopper and tile.m < 64:
            rate *= _OLD_UNITS  # the new instructions take 64 rows
        computing = flops / (rate * units_share(tile, rights, hopper=self.is_hopper))
        loaded = self._step_bytes(tile)
        loading = loaded * device.sm_count / device.l2_bytes_per_s
        # of the latency, each resident tile and each stage in flight hides a part
        waiting = _LATENCY_S / (self._in_flight(tile) * resident)
        return max(computing, loading, waiting) + _MEETING_S / resident

    def _in_flight(self, tile: MatmulTile) -> float:
        """Steps whose loads are on their way; Hopper's matrix units still read the step before."""
        return max(tile.num_stages - (2 if self.is_hopper else 1), 0.5)

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
        return sum(each.sizes[0] * each.sizes[1] * each.sizes[3] for each in self.launched)

    @cached_property
    def epilogue(self) -> tuple[float, float]:
        """Bytes and arithmetic of the epilogues of all tiles."""
        moved = epilogue_traffic(self.made, self.program)
        special = TRANSCENDENTAL_FLOPS * value_of(moved.transcendentals, self.hints)
        own = value_of(moved.bytes, self.hints), value_of(moved.flops, self.hints) + special
        others = [other.epilogue for other in self.beside]
        return own[0] + sum(bytes for bytes, _ in others), own[1] + sum(work for _, work in others)
