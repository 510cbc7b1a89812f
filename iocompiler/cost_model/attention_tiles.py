"""Tiles of the attention templates, as data: by kernel, element size, head width and device."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from iocompiler.tile.index import power_of_two
from iocompiler.tile.score import ScoreProgram
from iocompiler.tile.score_operands import use


@dataclass(frozen=True)
class Tile:
    """``m`` queries by ``n`` keys at a time, warps of a program, stages of its loads, and how many
    registers a thread may have (0: as many as the assembler takes).
    """

    m: int
    n: int
    warps: int
    stages: int
    registers: int = 0


@dataclass(frozen=True)
class Row:
    """Tiles of the kernels for heads up to ``width`` wide, elements up to ``bytes`` large, on
    devices of compute capability ``capability`` and newer.
    """

    capability: tuple[int, int]
    bytes: int
    width: int
    forward: Tile
    dq: Tile
    dkv: Tile
    operand: Tile  # square: see `operand_diagonals`
    crowded: Tile | None = None
    """The forward's where scores have a function of their own, or rows few blocks: what more
    programs hide is then worth more than tiles read further ahead. Of the forward's size."""

    @property
    def grain(self) -> tuple[int, int]:
        """The largest blocks that tiles of all kernels are made of."""
        tiles = (self.forward, self.dq, self.dkv)
        return math.gcd(*(t.m for t in tiles)), math.gcd(*(t.n for t in tiles))

    def lighter(self, *, gathers: bool = False) -> Row:
        """For a program that loads an element for each score, or masks loads of a narrow head: its
        loads take registers, and a third stage of them spills.

        Args:
            gathers: an element's place is computed from both positions, and the head is wider than
                64 or masked: the addresses of 64 keys would spill.
        """
        tiles = (self.forward, self.dq, self.dkv)
        forward, dq, dkv = (replace(each, stages=min(each.stages, 2)) for each in tiles)
        if gathers:
            forward = replace(forward, n=min(forward.n, 32))
        return replace(self, forward=forward, dq=dq, dkv=dkv)

    def unlimited(self) -> Row:
        """For masked loads of a narrow head: a limit of registers would spill."""
        tiles = (self.forward, self.dq, self.dkv)
        forward, dq, dkv = (replace(each, registers=0) for each in tiles)
        return replace(self, forward=forward, dq=dq, dkv=dkv)


_SQUARE, _SMALL, _TINY = Tile(64, 64, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)
# the first row that fits is taken: least capability, element size, head width, then the tiles of
# forward, dq, dkv and operand gradients
ROWS = (
    # the fastest of seven to ten tiles on an H200, with ALiBi and with a window (torch 2.11)
    Row(
        (9, 0),
        2,
        64,
        Tile(64, 64, 4, 3, 168),
        Tile(64, 64, 4, 3, 168),
        Tile(32, 64, 4, 3, 168),
        _SQUARE,
        Tile(64, 64, 4, 2, 128),
    ),
    # the fastest of eight to eleven on an H100, with ALiBi and with a causal mask (torch 2.11)
    Row((9, 0), 2, 128, Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), _SQUARE),
    # compiled for sm_90 these spill nothing to speak of
    Row((9, 0), 2, 256, Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), _SQUARE),
    Row((0, 0), 2, 64, Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), _SQUARE),
    Row((0, 0), 2, 128, Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), _SQUARE),
    Row((0, 0), 2, 256, Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), _SMALL),
    Row((0, 0), 4, 64, Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), _SMALL),
    Row((0, 0), 4, 128, Tile(16, 32, 8, 1), Tile(32, 32, 8, 2), Tile(16, 32, 8, 1), _SMALL),
    Row((0, 0), 4, 256, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), _TINY),
)


def row(capability: tuple[int, int], bytes_each: int, width: int) -> Row:
    """The tiles for a device.

    Raises:
        LookupError: no template takes heads as wide.
    """
    for each in ROWS:
        if capability >= each.capability and bytes_each <= each.bytes and width <= each.width:
            return each
    raise LookupError(f"heads of {width} elements of {bytes_each} bytes")


@functools.lru_cache(maxsize=512)
def chosen(program: ScoreProgram, capability: tuple[int, int], bytes_each: int, width: int) -> Row:
    """The tiles for a program on a device.

    Args:
        width: the larger one of keys' and values' heads.

    Raises:
        LookupError: no template takes heads as wide.
    """
    found = row(capability, bytes_each, width)
    loads, masked = _loads(program), width < padded(width)
    if not loads and not masked:
        return found
    found = replace(found, crowded=None)
    if masked:
        found = found.unlimited()
    return found.lighter(gathers=loads == "diagonal" and (masked or width > 64))


def _loads(program: ScoreProgram) -> str:
    """How an element is loaded for each score: "diagonal" for places that are computed, "tile", ""
    where none is.
    """
    ways = [use(program, load) for load in program.loads(program.score)]
    if any(way is None or way.way in ("diagonal", "part") for way in ways):
        return "diagonal"
    return "tile" if any(way is not None and way.way == "tile" for way in ways) else ""


def padded(width: int) -> int:
    """The width of a tile that holds heads of ``width``."""
    # operands narrower than a line of shared memory were read past their end beside pipelined
    # loads (heads of 40 and 24 elements, Triton 3.6 on an H200)
    return max(64, power_of_two(width))
