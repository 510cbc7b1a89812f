"""Philox2x32-7 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC11, table 2: seven rounds pass BigCrush) in plain torch.

A block of two words serves four neighbouring elements, 16 bits each: element c has the upper half
of word (c // 2) % 2 of block c // 4 where c is even, the lower half where it is odd. The block's
counter words are the low half of its number, and the high half xor the seed's high half; the key is
the seed's low half. The generated kernels draw the same bits (``_random_bits`` of
``codegen/prelude.py``).

Sixteen bits are enough for a dropout: P(number >= p) is 1 - p to 2 ** -17. With a block for every
two elements a GELU with dropout would be an eighth more instructions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROUNDS = 7
_MULTIPLIER = 0xD256D193
_WEYL = 0x9E3779B9
_LOW = 0xFFFFFFFF
BITS = 16  # of an element
_CELLS = 1 << BITS


def uniform(seed: Tensor | int, counter: Tensor) -> Tensor:
    """Uniform numbers in (0, 1): the middles of 2 ** 16 equal cells, which float32 holds exactly.

    Args:
        seed: int64, broadcastable to ``counter``, or a number.
        counter: integers from 0, any shape; each has its own number.

    Returns:
        float32 of the broadcast shape.
    """
    return (random_bits(seed, counter).to(torch.float32) + 0.5) / _CELLS


def random_bits(seed: Tensor | int, counter: Tensor) -> Tensor:
    """16 random bits for each counter, as int64 in [0, 2 ** 16). Arguments as of `uniform`."""
    low, high = block(seed, counter.to(torch.int64) >> 2)
    word = torch.where((counter & 2) != 0, high, low)
    return torch.where((counter & 1) != 0, word & 0xFFFF, word >> BITS)


def block(seed: Tensor | int, number: Tensor) -> tuple[Tensor, Tensor]:
    """Both words of each block, as int64 in [0, 2 ** 32).

    Args:
        seed: int64, broadcastable to ``number``, or a number.
        number: int64, any shape.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=number.device)
    key = seed & _LOW
    low, high = number & _LOW, ((number ^ seed) >> 32) & _LOW
    for _ in range(_ROUNDS):
        product = low * _MULTIPLIER  # wraps around at 64 bits, which keeps the bits right
        low, high = ((product >> 32) & _LOW) ^ key ^ high, product & _LOW
        key = (key + _WEYL) & _LOW
    return low, high


def threshold(p: float) -> int:
    """How many of the 2 ** 16 numbers of `uniform` are below p."""
    return min(max(math.ceil(p * _CELLS - 0.5), 0), _CELLS)
