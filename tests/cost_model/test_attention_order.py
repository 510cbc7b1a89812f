"""How many heads of an attention take turns, and what starts before."""

from __future__ import annotations

import pytest

from iocompiler.cost_model.attention_order import heads_together, rows_ahead
from iocompiler.cost_model.device import DEVICES

H200 = DEVICES["h200"]


@pytest.mark.parametrize(
    ("heads", "bytes_each", "expected"),
    [
        (64, 2**20, 22),  # three turns of what half of 50 MiB holds
        (16, 2**20, 16),
        (1, 2**20, 1),
        (7, 2**30, 1),  # more than L2 for one
        (8, 0, 8),
    ],
)
def test_as_many_as_fit_in_turns_alike(heads: int, bytes_each: int, expected: int) -> None:
    assert heads_together(heads, bytes_each, H200) == expected


@pytest.mark.parametrize(("heads", "expected"), [(1, 66), (16, 4), (64, 1), (1000, 1)])
def test_few_of_the_longest_rows_start_ahead(heads: int, expected: int) -> None:
    assert rows_ahead(heads, H200) == expected
