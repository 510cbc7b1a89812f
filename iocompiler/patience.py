"""How long a compilation may measure under mode="max-autotune"."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

TIMES = 4.0
"""Measuring may take so many times as long as all else that a compilation does: a first call then
takes at most five times the default's."""
LEAST_S = 5.0
"""And so long in any case: what the default's first call still has to do when measuring begins,
compiling kernels, takes a second and more of however small a graph."""


@dataclass
class Patience:
    """Of one compilation, which begins with this.

    Attributes:
        clock: seconds from any start.
        spent: seconds that measuring took until now.
    """

    clock: Callable[[], float] = time.perf_counter
    spent: float = 0.0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def left(self) -> float:
        """Seconds that measuring may still take; 0 where it took them already."""
        others = self.clock() - self.started - self.spent
        return max(0.0, max(LEAST_S, TIMES * others) - self.spent)

    @contextmanager
    def measuring(self) -> Iterator[float]:
        """What is done in here is measuring; gives the seconds that are left for it."""
        left, begun = self.left, self.clock()
        try:
            yield left
        finally:
            self.spent += self.clock() - begun
