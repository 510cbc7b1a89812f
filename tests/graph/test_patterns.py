"""The patterns of masks: found exactly where the values are theirs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from iocompiler.graph.patterns import Band, Hiding, pattern

INF = math.inf


def filled(rows: int, columns: int, value: float) -> Tensor:
    return torch.full((rows, columns), value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (filled(5, 5, -INF).triu(1), Band(0.0, -INF, None, 0)),
        (filled(5, 8, -1e9).triu(4), Band(0.0, -1e9, None, 3)),
        (filled(8, 5, 1.0).tril(-2), Band(0.0, 1.0, -1, None)),
        (torch.ones(5, 5, dtype=torch.bool).tril(), Band(1.0, 0.0, None, 0)),
        (torch.ones(5, 5).triu(-1).tril(2), Band(1.0, 0.0, -1, 2)),
        (1.0 - torch.ones(5, 5).triu(-1).tril(2), Band(0.0, 1.0, -1, 2)),
        (torch.eye(4).bool(), Band(1.0, 0.0, 0, 0)),
        (filled(4, 1, -INF).triu(0), Band(-INF, 0.0, 0, None)),
        (filled(1, 4, -INF).triu(2), Band(0.0, -INF, None, 1)),
        (filled(5, 5, -INF).triu(1).expand(2, 3, 5, 5), Band(0.0, -INF, None, 0)),
        (filled(5, 5, -INF).triu(1).half(), Band(0.0, -INF, None, 0)),
    ],
)
def test_bands(values: Tensor, expected: Band) -> None:
    assert pattern(values) == expected


def test_every_band_of_a_small_matrix() -> None:
    rows, columns = 3, 4
    apart = torch.arange(columns) - torch.arange(rows)[:, None]
    for low in range(1 - rows, columns):
        for high in range(low, columns):
            values = (apart >= low) & (apart <= high)
            found = pattern(values)
            if values.all():
                assert found is None
                continue
            assert isinstance(found, Band)
            inside = apart >= (-INF if found.low is None else found.low)
            inside &= apart <= (INF if found.high is None else found.high)
            assert torch.equal(torch.where(inside, found.inside, found.outside).bool(), values)


def test_what_hides_and_is_no_band() -> None:
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3))
    assert pattern((1.0 - blocks) * -1e9) == Hiding(-1e9, 0.0)
    slopes = (torch.arange(5) - torch.arange(5)[:, None]) * 0.5
    assert pattern(slopes + filled(5, 5, -INF).triu(1)) == Hiding(-INF, 2.0)
    two = torch.stack([filled(3, 3, -INF).triu(1), filled(3, 3, -INF).tril(-1)])
    assert pattern(two) == Hiding(-INF, 0.0)
    assert pattern(filled(2, 2, 0.0).index_fill(0, torch.tensor([1]), -1e4).mT) is not None


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(4, 4),
        filled(4, 4, -INF),
        torch.randn(4, 4),
        torch.zeros(16),
        torch.zeros(0, 4),
        torch.tensor([[0.0, -INF], [math.nan, 0.0]]),
        torch.tensor([[0.0, -1e9], [-2e9, 0.0], [-1e9, 0.0]]),
        torch.tensor([[0.0, -1e9], [2e4, 0.0]]),
        torch.tensor([[INF, -1e9], [1.0, 0.0]]),
        torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) > 0.5,
        torch.ones(4, 4, dtype=torch.int64).tril(),
    ],
    ids=["zeros", "full", "random", "a vector", "empty", "nan", "two values hide", "a large bias",
         "infinity", "random booleans", "integers"],
)  # fmt: skip
def test_no_pattern(values: Tensor) -> None:
    assert pattern(values) is None
