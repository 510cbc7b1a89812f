"""Random legal plans, what they compute, and the correlation of ranks."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.module_zoo import CASES
from benchmarks.plans import (
    Plans,
    Step,
    at_random,
    correlated,
    distinct,
    error,
    kernels,
    recorded,
    spearman,
)
from iocompiler.cost_model.device import DEVICES
from iocompiler.plan.group import faster
from iocompiler.runtime.reference import run_plan

H200 = DEVICES["h200"]


def test_ranks_correlate() -> None:
    assert spearman([1.0, 2.0, 3.0], [10.0, 100.0, 1000.0]) == pytest.approx(1)
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    # 1 - 6 * (1 + 1) / (4 * 15)
    assert spearman([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0]) == pytest.approx(0.8)
    # ties share the mean of their ranks: (0.5, 0.5, 2) against (0, 1, 2)
    assert spearman([1.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == pytest.approx(math.sqrt(0.75))
    assert spearman([1.0, 1.0], [1.0, 2.0]) is None
    assert spearman([], []) is None


def test_only_random_plans_that_were_measured_count() -> None:
    rows = [
        {"name": "chosen", "modeled us": 1.0, "measured us": 4.0},
        {"name": "plan 1", "modeled us": 2.0, "measured us": 5.0},
        {"name": "plan 2", "modeled us": 3.0, "measured us": 6.0},
        {"name": "plan 3", "modeled us": 4.0, "measured us": 3.0},
        {"name": "plan 4", "modeled us": 9.0},
    ]
    summary = correlated(rows)
    assert summary["random plans measured"] == 3
    assert summary["rank correlation of modeled and measured time"] == pytest.approx(-0.5)
    assert summary["random plans faster than the chosen"] == 1
    assert summary["fastest random plan / chosen"] == 0.75


def test_errors_are_relative_and_integers_exact() -> None:
    ones, tiny = torch.ones(8), torch.full((8,), 1e-9)
    seed = torch.tensor(3)
    assert error([ones, tiny, seed, 5], [ones, -tiny, seed, 5]) < 1  # next to ones, it is nothing
    assert error([ones * (1 + 1e-3), tiny], [ones, tiny]) == pytest.approx(10, rel=1e-3)
    assert error([ones, seed + 1], [ones, seed]) == math.inf
    assert error([ones * math.nan], [ones]) == math.inf
    assert error([ones, 5], [ones, 6]) == math.inf


def _groups(plans: Plans) -> list[tuple[str, ...]]:
    """The nodes of each kernel."""
    return [kernel.nodes for plan in plans.values() for kernel in kernels(plan)]


@pytest.fixture(scope="module")
def step() -> Step:
    (case,) = (case for case in CASES if case.name == "rms norm + swiglu")
    return recorded(case, quick=True)


def test_a_seed_decides_the_plan(step: Step) -> None:
    assert step.plans(H200, at_random(3)) == step.plans(H200, at_random(3))
    found = distinct(step, H200, 3)
    groups = {frozenset(_groups(plans)) for plans in found.values()}
    assert len(groups) == len(found) == 3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_every_legal_plan_computes_the_same(step: Step, share: float) -> None:
    """None merged, by the coin, all merged that can be; the chosen one has the least time."""
    accept = {0.0: lambda _: lambda *_: False, 0.5: at_random(1), 1.0: lambda _: lambda *_: True}
    plans = step.plans(H200, accept[share])
    for name, plan in plans.items():
        results = run_plan(plan, list(step.given[name]))
        assert error(results, step.results[name]) <= 1, name
    chosen = step.plans(H200, lambda _: faster)
    assert step.modeled(chosen, H200).time_us <= step.modeled(plans, H200).time_us
    if share == 0.0:
        assert max(map(len, _groups(plans))) == 1
        assert len(_groups(plans)) > len(_groups(chosen))
