"""What a bound on memory cost: the record of a choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """One way to partition a training step.

    Attributes:
        name: of the way (`recompute/candidates.py`).
        peak: the most bytes held at once above parameters and inputs, as planned.
        time_us: modeled microseconds of forward and backward.
        saved: bytes the forward hands to the backward, its inputs left out.
    """

    name: str
    peak: int
    time_us: float
    saved: int


@dataclass(frozen=True)
class Again:
    """A tensor that is kept for the backward without a bound on memory, and made again under it."""

    name: str
    operator: str
    bytes: int
    where: str = ""


@dataclass(frozen=True)
class Trade:
    """Memory for time, in one training step.

    Attributes:
        allowed: bytes.
        chosen: the fastest point within them; the one with the lowest peak where none is.
        unconstrained: what is chosen where memory is not bounded.
        again: what is made again instead of kept.
        points: all that there was to choose from.
    """

    allowed: int
    chosen: Point
    unconstrained: Point
    again: tuple[Again, ...] = ()
    points: tuple[Point, ...] = ()

    @property
    def fits(self) -> bool:
        return self.chosen.peak <= self.allowed


def trade_of(data: Mapping[str, Any]) -> Trade:
    """The trade that ``data`` was made from by JSON, field by field."""
    return Trade(
        data["allowed"],
        Point(**data["chosen"]),
        Point(**data["unconstrained"]),
        tuple(Again(**row) for row in data["again"]),
        tuple(Point(**row) for row in data["points"]),
    )
