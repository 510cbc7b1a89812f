"""Attention of few queries over many keys: in how many parts the keys are read, and how long that
and a library's kernel take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from iocompiler.cost_model.attention_tiles import Tile, padded
from iocompiler.cost_model.device import Device

MOST_QUERIES = 16
MOST_ROWS = 64

_TILES = (
    # largest element in bytes, widest head, most rows, keys, stages; compiled for sm_90 nothing
    # spills, and three programs of 16 rows fit an SM
    (2, 64, 16, 128, 3),
    (2, 64, 64, 64, 3),
    (2, 128, 64, 64, 3),
    (2, 256, 16, 32, 3),
    (4, 64, 16, 32, 3),
    (4, 128, 16, 32, 2),
    (4, 256, 16, 16, 2),
)
_WARPS = 4
_RESERVED = 1024  # bytes of shared memory a program has besides its own


@dataclass(frozen=True)
class Decode:
    """``batch`` x ``groups`` key heads of ``columns`` keys, each read by ``members`` query heads of
    ``rows`` queries; ``width`` elements of ``bytes`` each of a key, ``value_width`` of a value.
    """

    batch: int
    groups: int
    members: int
    rows: int
    columns: int
    width: int
    value_width: int
    bytes: int

    @property
    def heads(self) -> int:
        """Key heads."""
        return self.batch * self.groups

    @property
    def packed(self) -> int:
        """Queries of a key head."""
        return self.members * self.rows

    @property
    def row_bytes(self) -> int:
        """Of a key and its value."""
        return (self.width + self.value_width) * self.bytes


def tile(work: Decode) -> Tile:
    """The tile of the template, the rows of a key head in as few as there can be.

    Raises:
        LookupError: no template takes heads as wide.
    """
    wide = max(work.width, work.value_width)
    fits = [each for each in _TILES if work.bytes <= each[0] and wide <= each[1]]
    least = max(16, 1 << (work.packed - 1).bit_length())
    for bytes_each, widest, most, n, stages in fits:
        same = [each[2] for each in fits if each[:2] == (bytes_each, widest)]
        if least <= most or most == max(same):
            return Tile(min(least, most), n, _WARPS, stages)
    raise LookupError(f"heads of {wide} elements of {work.bytes} bytes")


def parts(work: Decode, device: Device) -> int:
    """In how many parts the keys of a head are read: the fewest of those that take least time."""
    chosen = tile(work)
    programs = work.heads * math.ceil(work.packed / chosen.m)
    two_waves = math.ceil(2 * _resident(chosen, work, device) / programs)
    most = max(1, min(two_waves, math.ceil(work.columns / chosen.n)))
    return min(range(1, most + 1), key=lambda count: template_time(work, device, count))


def template_time(work: Decode, device: Device, count: int) -> float:
    """Seconds of the template with the keys in ``count`` parts: each program resident has its share
    of the memory's rate, and the last wave is as long as the others.
    """
    chosen = tile(work)
    resident = _resident(chosen, work, device)
    programs = work.heads * math.ceil(work.packed / chosen.m) * count
    blocks = math.ceil(math.ceil(work.columns / chosen.n) / count)
    of_a_block = chosen.n * work.row_bytes * resident / device.memory_rate
    seconds = device.launch_s + math.ceil(programs / resident) * blocks * of_a_block
    if count > 1:  # written, and read again by a second kernel
        partial = work.heads * work.packed * count * 4 * (work.value_width + 2)
        seconds += device.launch_s + 2 * partial / device.memory_rate
    return seconds


def _resident(chosen: Tile, work: Decode, device: Device) -> int:
    """Programs that run at the same time."""
    by_memory = device.shared_bytes_per_sm // (shared_bytes(chosen, work) + _RESERVED)
    by_registers = 4 if chosen.m < 64 else 2  # 128 and 255 of a thread
    return device.sm_count * max(1, min(by_memory, by_registers))


def shared_bytes(chosen: Tile, work: Decode) -> int:
    """Shared memory of a program: blocks of keys and values on their way, the queries and, where
    they do not stay in registers, the probabilities.
    """
    group = chosen.m >= 64  # a warp group's products read their block from there
    blocks = chosen.stages if group else chosen.stages - 1
    width, value_width = padded(work.width), padded(work.value_width)
    probabilities = 0 if group else chosen.n
    ways = blocks * chosen.n * (width + value_width)
    return (ways + chosen.m * (width + probabilities)) * work.bytes


def library_time(work: Decode, device: Device, kernel: str) -> float:
    """Seconds of a library's kernel (`attention_choice.KERNELS`), with no mask.

    FlashAttention shares the keys out among programs as the template does, and packs the heads of a
    group where there is one query. Else each head reads its keys, from L2 where a neighbour has
    read them before. The others have one program a head; the memory-efficient kernel is given keys
    and values repeated, written and read once more.
    """
    once = work.heads * work.columns * work.row_bytes
    readers = 1 if kernel == "flash" and work.rows == 1 else work.members
    again = max(1.0, readers * device.memory_rate / device.l2_bytes_per_s)
    if kernel == "flash":
        return again * template_time(work, device, parts(work, device))
    if kernel == "efficient" and work.members > 1:
        again = 2 + 2 * work.members
    filled = min(1.0, work.heads * work.members / device.sm_count)
    return device.launch_s + again * once / device.memory_rate / filled


def template_is_better(work: Decode, device: Device, kernel: str) -> bool:
    """Whether the template takes no longer than a library's kernel. Of equals the library's stays
    where heads share no keys; else ours computes on fewer rows that are not there.
    """
    ours = template_time(work, device, parts(work, device))
    theirs = library_time(work, device, kernel)
    return ours < theirs or (ours == theirs and work.members > 1)
