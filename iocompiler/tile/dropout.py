"""Which probabilities of an attention its dropout leaves: a pure function of a seed and of the
place (b, h, i, j), whatever the lengths.

Each head has a seed of its own, the two words of block (b, h) under the given one; score (i, j) is
word j % 2 of block (i, j // 2) under that (Philox2x32-7, ``philox.py``). The generated kernels draw
the same bits (``codegen/score_functions.py``).
"""

from __future__ import annotations

import math

from torch import Tensor

from iocompiler.tile.philox import random_bits


def kept(seed: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, dropout_p: float) -> Tensor:
    """bool of the broadcast shape: true with probability 1 - dropout_p.

    Args:
        seed: one int64.
        b, h, i, j: int64 from 0, below 2 ** 31, that broadcast.
    """
    block = (b << 33) + (h << 1)
    own = random_bits(seed, block) | (random_bits(seed, block + 1) << 32)
    return random_bits(own, (i << 33) + j) >= threshold(dropout_p)


def threshold(dropout_p: float) -> int:
    """What 32 random bits must reach to be kept: as a float32 of 24 of them would reach
    ``dropout_p``.
    """
    return math.ceil(dropout_p * 2**24) << 8
