"""What is certain of sizes and strides, be they symbols: nothing here adds a guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true


def known(condition: Any) -> bool:
    """Whether a condition holds for every value of the symbols."""
    return bool(statically_known_true(condition))


def equal(a: Any, b: Any) -> bool:
    return known(a == b)


def same_sizes(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether they are as many, and equal one by one."""
    return len(some) == len(others) and all(map(equal, some, others))
