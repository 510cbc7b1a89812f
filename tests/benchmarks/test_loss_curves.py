"""The verdicts on loss curves, and what a seed decides."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

from benchmarks.loss_curves import (
    QUICK,
    TEXT,
    VARIANTS,
    characters,
    compared,
    drawn,
    tenths,
    train,
)
from benchmarks.peers import PEERS

EAGER = [3.0 - 0.01 * step for step in range(100)]


def _moved(by: float) -> list[float]:
    return [loss + by for loss in EAGER]


def test_tenths_are_means_of_equal_parts() -> None:
    assert tenths([float(n) for n in range(20)]) == [0.5 + 2 * n for n in range(10)]
    for curve in ([], [1.0] * 15):
        with pytest.raises(ValueError, match="equal parts"):
            tenths(curve)


def test_a_curve_near_the_same_seed_passes() -> None:
    row = compared(_moved(0.001), EAGER, [_moved(0.1), _moved(-0.1)])
    assert row["within the spread"] == row["no drift"] == "yes"
    assert row["spread 1"] == pytest.approx(0.2)
    assert row["allowed"] == pytest.approx(0.1)
    assert row["drift"] == pytest.approx(0.001)
    assert row["rise"] == pytest.approx(0, abs=1e-9)
    assert row["furthest"] == pytest.approx(0.001)


def test_outside_of_the_spread_in_one_tenth_is_told() -> None:
    ours = [loss + (0.25 if 20 <= step < 30 else 0) for step, loss in enumerate(EAGER)]
    row = compared(ours, EAGER, [_moved(0.1), _moved(-0.1)])
    assert row["within the spread"] == "NO"
    assert row["ours - eager 3"] == pytest.approx(0.25)
    assert row["at step"] in range(21, 31)


def test_a_drift_inside_of_the_spread_is_told() -> None:
    others = [_moved(0.1), _moved(-0.1)]
    late = [loss + (0.15 if step >= 50 else 0) for step, loss in enumerate(EAGER)]
    row = compared(late, EAGER, others)
    assert row["within the spread"] == "yes"
    assert row["no drift"] == "NO"
    rising = [loss + 0.0018 * (step - 70) for step, loss in enumerate(EAGER)]
    row = compared(rising, EAGER, others)
    assert abs(float(row["drift"] or 0)) < 0.1  # the mean alone would pass
    assert row["no drift"] == "NO"


def test_a_loss_that_is_no_number_fails() -> None:
    row = compared([*EAGER[:-1], math.nan], EAGER, [_moved(1.0)])
    assert row["within the spread"] == row["no drift"] == "NO"


def test_the_text_is_all_of_the_sonnets() -> None:
    text = TEXT.read_text()
    assert len(re.findall(r"^[IVXLC]+$", text, re.MULTILINE)) == 154
    tokens, count = characters(text)
    assert count == len(set(text)) == 62
    inputs, targets = drawn(tokens, QUICK, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (QUICK.batch, QUICK.length)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_a_seed_decides_the_curve() -> None:
    short = dataclasses.replace(QUICK, width=16, layers=1, length=16, steps=10)
    runs = [train(short, VARIANTS[0], PEERS["eager"], seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
