"""What the values of a mask come to: two numbers, one inside of a band of diagonals and the other
outside of it; or biases and one number that hides scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

HIDES = -9.9e3
"""No bias is as negative: what is hides the score that it is added to. (-1e4 in bfloat16 is -9984.)
"""
_LARGEST = 1 << 26  # elements that are looked at
_DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Band:
    """``inside`` where ``low <= column - row <= high`` (None: without an end), else ``outside``."""

    inside: float
    outside: float
    low: int | None
    high: int | None


@dataclass(frozen=True)
class Hiding:
    """``value`` at what is hidden; elsewhere nothing that exceeds ``bound`` either way."""

    value: float
    bound: float


Pattern: TypeAlias = Band | Hiding


def pattern(values: Tensor) -> Pattern | None:
    """The pattern in the last two dims of a tensor, the same all along the others of a `Band`; None
    where there is none, or but one value.
    """
    if values.dim() < 2 or values.dtype not in _DTYPES or not 1 < values.numel() <= _LARGEST:
        return None
    with torch.no_grad():
        return _band(values) or _hiding(values)


def _band(values: Tensor) -> Band | None:
    matrix = values.reshape(-1, *values.shape[-2:])[0]
    first = matrix[0, 0]
    others = matrix[matrix != first]
    if not len(others):
        return None
    for inside, outside in ((first, others[0]), (others[0], first)):
        low, high = _ends(matrix == inside)
        expected = torch.where(_within(matrix, low, high), inside, outside)
        if bool((values == expected).all()):
            rows, columns = matrix.shape
            ends = (low if low > 1 - rows else None, high if high < columns - 1 else None)
            return Band(float(inside), float(outside), *ends)
    return None


def _ends(inside: Tensor) -> tuple[int, int]:
    """The least and the greatest column minus row among what is set, which is something."""
    columns = inside.shape[1]
    first = inside.to(torch.uint8).argmax(1)
    last = columns - 1 - inside.flip(1).to(torch.uint8).argmax(1)
    rows = torch.arange(len(inside), device=inside.device)
    there = inside.any(1)
    return int((first - rows)[there].min()), int((last - rows)[there].max())


def _within(matrix: Tensor, low: int, high: int) -> Tensor:
    rows, columns = (torch.arange(n, device=matrix.device) for n in matrix.shape)
    rows = rows[:, None]
    return (columns >= rows + low) & (columns <= rows + high)


def _hiding(values: Tensor) -> Hiding | None:
    if not values.dtype.is_floating_point:
        return None
    least = float(values.min())
    if not least <= HIDES:  # nor where something is no number
        return None
    others = values[values != least].abs()
    bound = float(others.max()) if len(others) else math.inf
    return Hiding(least, bound) if bound < -HIDES else None
