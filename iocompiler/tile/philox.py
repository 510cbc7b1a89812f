"""Philox2x32-7 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC11, table 2: seven rounds pass BigCrush) in plain torch.

A block of two words serves two neighbouring elements: element c is word c % 2 of block c // 2. The
block's counter words are the low half of its number, and the high half xor the seed's high half;
the key is the seed's low half. The generated kernels draw the same bits (``_uniform`` of
``codegen/prelude.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 7
_MULTIPLIER = 0xD256D193
_WEYL = 0x9E3779B9
_LOW = 0xFFFFFFFF
_SCALE = 2.0**-24  # float32 holds 24 bits exactly: no result is rounded up to 1


def uniform(seed: Tensor | int, counter: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2 ** -24.

    Args:
        seed: int64, broadcastable to ``counter``, or a number.
        counter: integers from 0, any shape; each has its own number.

    Returns:
        float32 of the broadcast shape.
    """
    return (random_bits(seed, counter) >> 8).to(torch.float32) * _SCALE


def random_bits(seed: Tensor | int, counter: Tensor) -> Tensor:
    """32 random bits for each counter, as int64 in [0, 2 ** 32). Arguments as of `uniform`."""
    odd, counter = (counter & 1).bool(), counter.to(torch.int64) >> 1
    seed = torch.as_tensor(seed, dtype=torch.int64, device=counter.device)
    key = seed & _LOW
    low, high = counter & _LOW, ((counter ^ seed) >> 32) & _LOW
    for _ in range(_ROUNDS):
        product = low * _MULTIPLIER  # wraps around at 64 bits, which keeps the bits right
        low, high = ((product >> 32) & _LOW) ^ key ^ high, product & _LOW
        key = (key + _WEYL) & _LOW
    return torch.where(odd, high, low)
