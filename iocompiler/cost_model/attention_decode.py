"""Attention of few queries over many keys: in how many parts the keys are read, and how long that
and a library's kernel take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from iocompiler.cost_model.attention_tiles import Tile, padded
from iocompiler.cost_model.device import Device
from iocompiler.tile.index import power_of_two

MOST_QUERIES = 16
_MOST_WAVES = 8
_TILES = (
    # largest element in bytes, widest head, most rows, keys, stages; compiled for sm_90 nothing
    # spills, and three programs of 16 rows fit an SM
    (2, 64, 32, 64, 4),
    (2, 128, 32, 64, 3),
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
    for bytes_each, widest, most, n, stages in _TILES:
        if work.bytes <= bytes_each and wide <= widest:
            m = max(16, power_of_two(work.packed))
            return Tile(min(m, most), n, _WARPS, stages)
    raise LookupError(f"heads of {wide} elements of {work.bytes} bytes")


def parts(work: Decode, device: Device) -> int:
    """In how many parts the keys of a head are read: the fewest of those that take least time."""
    chosen = tile(work)
    programs = work.heads * math.ceil(work.packed / chosen.m)
    blocks = math.ceil(work.columns / chosen.n)
    resident = device.sm_count * programs_per_sm(chosen, work, device)
    most = math.ceil(_MOST_WAVES * resident / programs)
    # of those in which the longest part is equally long, the fewest
    counts = sorted({math.ceil(blocks / longest) for longest in range(1, blocks + 1)})
    counts = [count for count in counts if count <= most]
    return min(counts, key=lambda count: template_time(work, device, count), default=1)


def template_time(work: Decode, device: Device, count: int) -> float:
    """Seconds of the template with the keys in ``count`` parts.

    Each program resident has its share of the memory's rate, the last wave is as long as the
    others, and a program waits for its first block. Tiles of queries of the same keys run at the
    same time: the keys come from L2 after the first.
    """
    chosen = tile(work)
    tiles = math.ceil(work.packed / chosen.m)
    resident = device.sm_count * programs_per_sm(chosen, work, device)
    waves = math.ceil(work.heads * tiles * count / resident)
    blocks = math.ceil(math.ceil(work.columns / chosen.n) / count)
    rate = min(tiles * device.memory_rate, device.l2_bytes_per_s)
    seconds = waves * (blocks + 1) * chosen.n * work.row_bytes * resident / rate
    seconds += device.launch_s
    if count > 1:  # written, and read again by a second kernel
        partial = work.heads * work.packed * count * 4 * (work.value_width + 2)
        seconds += device.launch_s + 2 * partial / device.memory_rate
    return seconds


def programs_per_sm(chosen: Tile, work: Decode, device: Device) -> int:
    """Programs that run on an SM at the same time."""
    by_memory = device.shared_bytes_per_sm // (shared_bytes(chosen, work) + _RESERVED)
    widths = (work.width, work.value_width)
    masked = any(padded(each) != each for each in widths)  # loads by element
    by_registers = 3 if chosen.m == 16 and not masked else 2  # 168 and 255 of a thread
    return max(1, min(by_memory, by_registers))


def shared_bytes(chosen: Tile, work: Decode) -> int:
    """Shared memory of a program: keys and values on their way, queries and probabilities."""
    width, value_width = padded(work.width), padded(work.value_width)
    ways = (chosen.stages - 1) * chosen.n * (width + value_width)
    return (ways + chosen.m * (width + chosen.n)) * work.bytes


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
