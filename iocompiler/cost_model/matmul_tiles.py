"""Which tile the matmul template gets, from the shape of its products and the device alone.

Tiles that are legal are ranked by the time they are expected to take (`matmul_work.py`): those
ranked first are measured under max-autotune, and `python -m benchmarks.matmul` shows how far the
choice is from the best.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from iocompiler.cost_model.device import Device
from iocompiler.cost_model.matmul import is_aligned
from iocompiler.cost_model.matmul_work import Work
from iocompiler.plan.column_sums import rows_of_part
from iocompiler.plan.product import MatmulTile, Product
from iocompiler.tile.program import TileProgram

MOST = 8
_BLOCKS = (16, 32, 64, 128, 256)
_DEPTHS = (32, 64, 128)
_STAGES = (2, 3, 4, 5)
_WARPS = (4, 8)
# elements that a thread may load one by one in a step: each has an address
_MOST_LOADED = 32
# 32-bit registers of a thread that hold sums
_LEAST_SUMS, _MOST_SUMS = 2, 128
# columns of a part of an epilogue; and how many tensors beside the sums are many
_LEAST_PART, _MANY_ACCESSES = 16, 3
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
    work = Work(made, program, device, hints or {})
    left = [(work.seconds(tile), tile) for tile in _Legal(work).tiles()]
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


def _shape(tile: MatmulTile) -> tuple[int, int, str]:
    return tile.m, tile.n, tile.loads


def _unusual(tile: MatmulTile) -> tuple[bool, int]:
    """Of equal tiles, what most products like best comes first."""
    return tile.programs > 0 and tile.loads == "pointers", abs(tile.num_stages - 4)


@dataclass(frozen=True)
class _Legal:
    """Which tiles there are for products with an epilogue."""

    work: Work

    def tiles(self) -> Iterator[MatmulTile]:
        """Every tile whose sums fit the registers and whose loads fit the shared memory; parts of
        column sums lie in one.
        """
        sizes = [each.sizes[:3] for each in self.work.launched]
        m, n, k = (max(extents) for extents in zip(*sizes, strict=True))
        part = rows_of_part(self.work.program)
        for rows in (block for block in _around(_BLOCKS, m) if block % part == 0):
            for columns in _around(_BLOCKS, n):
                for depth in _around(_DEPTHS, k):
                    for warps in _WARPS:
                        for stages in _STAGES:
                            tile = MatmulTile(rows, columns, depth, warps, stages)
                            if self._fits(tile):
                                yield from self._ways(tile)

    def _fits(self, tile: MatmulTile) -> bool:
        work = self.work
        if not _LEAST_SUMS <= work.sums(tile) <= self._most_sums:
            return False
        if work.shared(tile) > work.shared_there:
            return False
        if work.made.dtype == torch.float32 and tile.m * tile.n > _LARGEST_FLOAT32:
            return False
        return self._is_aligned or work.loaded(tile) <= _MOST_LOADED

    def _ways(self, tile: MatmulTile) -> Iterator[MatmulTile]:
        """One program a tile; programs that walk tiles, which descriptors load or pointers."""
        work = self.work
        tile = replace(tile, parts=min(self._parts(tile), tile.n // _LEAST_PART))
        yield tile
        programs = work.device.sm_count * work.resident(tile)
        if self._takes_descriptors:
            moved = replace(tile, loads="descriptors", programs=programs)
            if work.shared(moved) <= work.shared_there:
                yield moved
        # two sums leave no register for the walk
        if len(work.made.rights) == 1 and work.tiles(tile) > programs:
            yield replace(tile, programs=programs)

    def _parts(self, tile: MatmulTile) -> int:
        """What the epilogue loads and makes stands beside the sums: the more, the smaller parts."""
        parts = 2 if self.work.sums(tile) > _MOST_SUMS // 2 else 1
        return 2 * parts if self._wide_accesses >= _MANY_ACCESSES else parts

    @cached_property
    def _wide_accesses(self) -> int:
        """The most of any product."""
        return max(_wide_accesses(each.made, each.program) for each in self.work.launched)

    @cached_property
    def _most_sums(self) -> int:
        """Less where operands, or addresses that cannot be told from each other, take registers."""
        pair = len(self.work.made.rights) > 1 and not self.work.is_hopper
        return _MOST_SUMS // 2 if pair or not self._is_aligned else _MOST_SUMS

    @cached_property
    def _is_aligned(self) -> bool:
        return is_aligned(self.work.made)

    @cached_property
    def _takes_descriptors(self) -> bool:
        half = self.work.made.dtype in (torch.bfloat16, torch.float16)
        return half and self.work.is_hopper and self.work.made.takes_descriptors


def _wide_accesses(made: Product, program: TileProgram) -> int:
    """Tensors as large as the product that its epilogue loads and stores."""
    sums = {buffer.name for buffer in program.buffers[: len(made.rights)]}
    axes = {axis.name for axis in program.axes}
    return sum(
        op.kind in ("load", "store") and op.buffer not in sums and program.varies[place] == axes
        for place, op in enumerate(program.ops)
    )


def _around(blocks: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The blocks that are not mostly beyond a size."""
    largest = max(blocks[0], 1 << (size - 1).bit_length())
    return tuple(block for block in blocks if block <= largest)
