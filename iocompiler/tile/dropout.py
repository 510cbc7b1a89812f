"""Which probabilities of an attention its dropout leaves: a pure function of a seed and of the
place (b, h, i, j), whatever the lengths.

Each head has two words of its own, those of block (b, h) under the seed (Philox2x32-7,
``philox.py``). A hash serves four scores: those of rows i and i + 8 and of columns j and j + 8,
i // 8 and j // 8 even, which a thread holds all of in the tiles of the tensor cores and in their
transposes. It is of the two pairs and the head's words: two wide multiplications, of which both
halves are exclusive-ored (as in Yi's "wyhash"), with the second word in between, so that no head's
mask is another's moved. The second row has that word times one more factor; sums and exclusive ors
of what the hash goes through are not as good, as the upper halves of products have bits that are
seldom set. A block of Philox for each pair takes more instructions than all else that is done to a
score. The generated kernels draw the same bits (``codegen/score_functions.py``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iocompiler.tile import philox

ROW, COLUMN = 0x9E3779B1, 0x85EBCA77
FIRST, SECOND, THIRD = 0x7FEB352D, 0x846CA68B, 0xD35A2D97
_WORD = 0xFFFFFFFF


def kept(seed: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, dropout_p: float) -> Tensor:
    """bool of the broadcast shape: true with probability 1 - dropout_p.

    Args:
        seed: one int64.
        b, h, i, j: int64 from 0, below 2 ** 31, that broadcast.
    """
    low, high = philox.block(seed, (b << 32) + h)
    word = (_pair(i) * ROW + _pair(j) * COLUMN + low) & _WORD
    word = _folded(word * FIRST) ^ high
    word = _folded(word * SECOND)
    word = torch.where((i & 8) != 0, (word * THIRD) & _WORD, word)
    return torch.where((j & 8) != 0, (word << 16) & _WORD, word) >= threshold(dropout_p)


def _pair(place: Tensor) -> Tensor:
    """The number of the pair of places, eight apart, that this one is of."""
    return (place & 7) + ((place >> 4) << 3)


def _folded(product: Tensor) -> Tensor:
    """The halves of 64 bits, exclusive or."""
    return ((product >> 32) ^ product) & _WORD


def threshold(dropout_p: float) -> int:
    """What the 32 bits of a place must reach to be kept; a rate has 16 bits."""
    return math.ceil(dropout_p * 2**16) << 16
