"""How long a compilation may measure."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from iocompiler.patience import LEAST_S, TIMES, Patience


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def test_what_is_left_grows_with_all_else_and_shrinks_by_measuring() -> None:
    clock = Clock()
    patience = Patience(clock)
    clock.passes(20)
    with patience.measuring() as left:
        assert left == 20 * TIMES
        clock.passes(5)
    assert patience.left == 20 * TIMES - 5
    clock.passes(10)
    assert patience.left == 30 * TIMES - 5
    with patience.measuring():
        clock.passes(200)
    assert patience.left == 0


def test_a_small_graph_is_measured_too() -> None:
    clock = Clock()
    patience = Patience(clock)
    clock.passes(0.1)
    with patience.measuring() as left:
        assert left == LEAST_S
        clock.passes(2)
    assert patience.left == LEAST_S - 2


def test_what_fails_was_measuring_too() -> None:
    clock = Clock()
    patience = Patience(clock)
    clock.passes(1)

    def fails() -> None:
        with patience.measuring():
            clock.passes(3)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fails()
    assert patience.spent == 3


@pytest.mark.parametrize("wanted", [(1.0, 1.0, 1.0), (100.0, 100.0, 100.0), (0.0, 50.0, 2.0)])
def test_a_compilation_takes_five_times_the_rest_at_most(wanted: Sequence[float]) -> None:
    clock = Clock()
    patience = Patience(clock)
    for seconds in wanted:
        clock.passes(1.5)
        with patience.measuring() as left:
            clock.passes(min(left, seconds))
    others = 1.5 * len(wanted)
    assert clock.now - 100 <= others + max(LEAST_S, TIMES * others)
