"""The gradient of an embedding table: by what its tokens are put in order, and in what tiles their
rows are added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from iocompiler.cost_model.device import Device

CHUNK = 16
"""Places of a chunk of the ordered tokens."""

_WARP = 32
_BYTES = 16  # of a row, of one thread
# instructions for a pair of tokens: a difference, its sign added, and a share of making a key
# (compiled for sm_90)
_PAIR = 2.5
# launches of a sort of 32-bit keys with their positions, estimated
_SORT = 12
# tokens of a program that counts: fewer where there would be too few programs
_COUNTED = 32
_OTHERS = 256  # a thread each
_AHEAD = 4


@dataclass(frozen=True)
class Tiles:
    """``counted`` tokens of a program against ``others`` at a time, and ``ahead`` times as many on
    their way; ``columns`` of a row, of one warp that adds a chunk.
    """

    counted: int
    others: int
    ahead: int
    columns: int


def by_counting(tokens: int, device: Device) -> bool:
    """Whether tokens are put in order by comparing all of them with all, in one launch; else by a
    sort of the library's.
    """
    lanes = device.vector_flops / 2  # instructions a second, where a multiply-add counts as two
    return _PAIR * tokens**2 / lanes <= _SORT * device.launch_s


def tiles(tokens: int, width: int, dtype: torch.dtype, device: Device) -> Tiles:
    """For ``tokens`` rows of ``width`` elements."""
    counted = _COUNTED
    while counted > 8 and tokens < counted * device.sm_count:
        counted //= 2
    most = _WARP * _BYTES // dtype.itemsize
    return Tiles(counted, _OTHERS, _AHEAD, min(most, 1 << max(width - 1, 0).bit_length()))


def scratch_bytes(tokens: int, width: int) -> int:
    """Places, keys, and the shares of chunks in sums that reach over their borders."""
    return 8 * tokens + 4 * 2 * -(-tokens // CHUNK) * width
