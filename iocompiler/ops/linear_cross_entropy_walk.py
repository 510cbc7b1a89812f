"""How a program of the kernel `cross_entropy_rows` walks through its row, by the row's length."""

from __future__ import annotations

import math
from dataclasses import dataclass

# What a thread reads at once, in bytes: rows the kernel reads begin at multiples of it.
ALIGNED = 16
# Elements: rows of an odd vocabulary are filled up to multiples of it, or cut at one. Blocks are
# multiples of it.
LINE = 64
_WORD = 8  # and where they are copied
_LANES = 32


@dataclass(frozen=True)
class _Way:
    """For rows of up to ``most_bytes``.

    Attributes:
        warps: of a program, whose threads together read one block.
        held: the most whole blocks that stay in registers between the two passes over a row.
        depth: how many of the others are read at once; at most ``held + 1``; 0: there are none.
        registers: of a thread at most, so that a multiprocessor takes two programs; None: any.
        kind: of rows: "any", "plain" ones (neither copied nor capped), "copied" ones.
    """

    most_bytes: float
    warps: int
    held: int
    depth: int
    registers: int | None
    kind: str


# The fastest of fifteen to twenty on an H100 at 30522, 32000, 50257 and 128256 bf16 columns (torch
# 2.11): with the gradient 93 to 98 % of a copy, with a copy 95 % (and 93 % with both). Two rows a
# multiprocessor of more than 190 KB each would not stay in L2 between the passes.
_WAYS = (
    _Way(1 << 14, warps=4, held=8, depth=0, registers=None, kind="any"),
    _Way(1 << 16, warps=8, held=16, depth=0, registers=128, kind="plain"),
    _Way(3 << 16, warps=16, held=3, depth=4, registers=64, kind="plain"),
    _Way(math.inf, warps=32, held=3, depth=4, registers=64, kind="plain"),
    _Way(math.inf, warps=32, held=3, depth=4, registers=64, kind="copied"),
    # a cap takes registers too
    _Way(math.inf, warps=16, held=1, depth=2, registers=64, kind="any"),
)


def of_row(vocabulary: int, itemsize: int, *, copied: bool, capped: bool) -> dict[str, int]:
    """BLOCK, WIDE, HELD, DEPTH and the options of a launch.

    Args:
        vocabulary: elements of a row, ``itemsize`` bytes each.
        copied: rows are copied: they are read in words.
        capped: logits are.
    """
    size = vocabulary * itemsize
    kind = "any" if capped else "copied" if copied else "plain"
    way = next(way for way in _WAYS if size <= way.most_bytes and way.kind in ("any", kind))
    wide = (_WORD if copied else ALIGNED) // itemsize
    # a row shorter than what the threads read together is less than one block
    block = min(way.warps * _LANES * wide, max(1 << vocabulary.bit_length(), wide))
    blocks = vocabulary // block
    again = 0
    if way.depth:
        again = -(-max(blocks - way.held, 0) // way.depth) * way.depth
    limit = {} if way.registers is None else {"maxnreg": way.registers}
    return limit | {
        "BLOCK": block,
        "WIDE": wide,
        "HELD": blocks - again,
        "DEPTH": way.depth if again else 0,
        "num_warps": way.warps,
    }


def of_two_rows(vocabulary: int, itemsize: int) -> dict[str, int]:
    """BLOCK, WIDE and the options of a launch of the kernel `divergence_rows`.

    Args:
        vocabulary: elements of both rows, at most ``itemsize`` bytes each.
    """
    wide = ALIGNED // itemsize
    warps = 4 if vocabulary * itemsize <= 1 << 14 else 16
    block = min(warps * _LANES * wide, max(1 << vocabulary.bit_length(), wide))
    return {"BLOCK": block, "WIDE": wide, "num_warps": warps}
