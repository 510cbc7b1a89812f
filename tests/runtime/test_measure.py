"""What all that times on a GPU has in common, without one: turns, and sets of arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iocompiler.errors import LaunchError
from iocompiler.runtime import measure
from iocompiler.runtime.measure import DoesNotFit, OnGpu, in_turns


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(calls, launches of each) of every batch; each takes a second more than the last one."""
    found: list[tuple[int, int]] = []

    def seconds(calls: list[Any], launches: int) -> float:
        for call in calls:
            call()
        found.append((len(calls), launches))
        return float(len(found))

    monkeypatch.setattr(measure, "batch_seconds", seconds)
    return found


def nothing() -> None:
    pass


def refused() -> None:
    raise LaunchError(kernel="k", action="launching", cause="no")


def test_seven_batches_however_long_they_take(batches: list[tuple[int, int]]) -> None:
    assert in_turns([[nothing] * 3, []], 4) == [5.0, None]
    assert batches == [(3, 4)] * (measure.REPEATS + 1)


def test_what_fails_is_an_error_unless_it_may(batches: list[tuple[int, int]]) -> None:
    with pytest.raises(LaunchError):
        in_turns([[refused]])
    assert in_turns([[refused], [nothing]], 1, (LaunchError,)) == [None, 5.0]


@pytest.mark.parametrize(
    ("one", "least", "beside", "expected"),
    [
        (1 << 10, 2, 0, measure.MOST_SETS),
        (1 << 14, 2, 0, 3),  # three times round a cache of as many bytes
        (1 << 16, 2, 0, 2),
        (1 << 16, 1, 0, 1),
        (4 << 16, 2, 0, 1),  # what fits
        (3 << 15, 2, 3, 1),
    ],
)
def test_as_many_sets_as_go_round_the_cache_and_fit(
    one: int, least: int, beside: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = of_cache(1 << 14, free=1 << 20, monkeypatch=monkeypatch)
    assert bench._sets(one, least, beside) == expected


@pytest.mark.parametrize("beside", [0, 1])
def test_what_does_not_fit(beside: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = of_cache(1 << 14, free=1 << 20, monkeypatch=monkeypatch)
    fits = int(measure.SHARE_OF_MEMORY * (1 << 20)) // (1 + beside)
    assert bench._sets(fits, beside=beside) == 1
    with pytest.raises(DoesNotFit, match="bytes of arguments"):
        bench._sets(fits + 1, beside=beside)


def of_cache(l2_bytes: int, free: int, monkeypatch: pytest.MonkeyPatch) -> OnGpu:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free, 1 << 40))
    found = object.__new__(OnGpu)
    found.index, found._l2_bytes = 0, l2_bytes
    return found
