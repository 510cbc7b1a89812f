"""Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC11) in plain torch.

The bits are those of Triton's ``tl.rand(seed, offset)``: key = the seed's two halves, counter =
(offset's low half, its high half, 0, 0), of the four results the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_SCALE = 4.6566127342e-10  # a little below 2 ** -31, so that the largest result stays below 1


def uniform(seed: Tensor | int, offset: Tensor) -> Tensor:
    """Uniform numbers in [0, 1).

    Args:
        seed: int64, broadcastable to ``offset``, or a number.
        offset: integers, any shape; each offset has its own number.

    Returns:
        float32 of the broadcast shape.
    """
    bits = random_bits(seed, offset)
    signed = torch.where(bits > 0x7FFFFFFF, bits - (_LOW + 1), bits)
    folded = torch.where(signed < 0, -signed - 1, signed)
    return folded.to(torch.float32) * torch.tensor(
        _SCALE, dtype=torch.float32, device=folded.device
    )


def random_bits(seed: Tensor | int, offset: Tensor) -> Tensor:
    """32 random bits for each offset, as int64 in [0, 2 ** 32). Arguments as those of `uniform`."""
    offset = offset.to(torch.int64)
    key = torch.as_tensor(seed, dtype=torch.int64, device=offset.device)
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    c0, c1 = offset & _LOW, (offset >> 32) & _LOW
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(_ROUNDS):
        high_a, low_a = _product(_MULTIPLIERS[0], c0)
        high_b, low_b = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0


def _product(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a product of two 32-bit numbers."""
    product = x * multiplier  # wraps around at 64 bits, which keeps the bits right
    return (product >> 32) & _LOW, product & _LOW
