"""How algorithms are timed, without a GPU: whose turn it is, how often, and on which memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from iocompiler.ops.library_product import Problem
from iocompiler.runtime import measure, measure_products
from iocompiler.runtime.cublaslt import Refused
from iocompiler.runtime.measure import DoesNotFit
from iocompiler.runtime.measure_products import GpuProductBench, in_turns
from iocompiler.runtime.values import storage_elements
from tests.runtime.algorithms import LAYER


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways in the order of their batches; a batch is what its calls return."""
    order: list[str] = []

    def seconds(calls: list[Callable[[], Any]], launches: int) -> float:
        name, taken = calls[0]()
        order.append(name)
        return float(taken)

    monkeypatch.setattr(measure, "batch_seconds", seconds)
    return order


def way(name: str, *seconds: float) -> list[Any]:
    """Seconds of its batches, the last one for all that follow."""
    left = list(seconds)
    return [lambda: (name, left.pop(0) if len(left) > 1 else left[0])]


def test_the_median_of_all_batches_but_the_first(clock: list[str]) -> None:
    found = in_turns([way("a", 9.0, 1e-5, 3e-5, 2e-5), way("b", 0.0, 4e-5)])
    assert found == [2e-5, 4e-5]
    assert clock == ["a", "b"] * (len(clock) // 2)
    assert len(clock) == 2 * (measure.REPEATS + 1)


def test_what_takes_long_is_called_less_often(clock: list[str]) -> None:
    assert in_turns([way("a", 0.05)]) == [0.05]
    assert 3 < len(clock) < measure.REPEATS + 1


def test_what_the_library_refuses_has_no_time(clock: list[str]) -> None:
    refused: list[Any] = [partial(measure_products._refused, 1, 2)]
    assert in_turns([way("a", 1e-5), refused, [], way("b", 2e-5)]) == [1e-5, None, None, 2e-5]
    with pytest.raises(Refused):
        measure_products._refused()


def bench(free: int, monkeypatch: pytest.MonkeyPatch) -> GpuProductBench:
    """On the CPU, with so many bytes."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free, 1 << 40))
    found = object.__new__(GpuProductBench)
    found.index, found.device, found._l2_bytes = 0, torch.device("cpu"), 1 << 14
    return found


SMALL = Problem(2, 6, 8, 4, torch.bfloat16, (40, 6, 1), (32, 1, 4), (48, 8, 1))


@pytest.mark.parametrize("form", ["plain", "bias", "added", "both", "gelu", "wide"])
def test_memory_holds_what_the_product_reads_and_writes(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, row = (48, 8, 1), (0, 0, 1)
    of = replace(
        SMALL,
        added={"bias": row, "gelu": row, "added": matrix, "both": matrix}.get(form),
        bias=form == "both",
        sums=matrix if form == "gelu" else None,
        activation="gelu" if form == "gelu" else None,
        stored=torch.float32 if form == "wide" else None,
    )
    sets = bench(1 << 24, monkeypatch).argument_sets(of)
    for given in sets:
        a, b, out, added, bias, sums = given
        elements = [None if x is None else x.numel() for x in given]
        assert elements[:3] == [storage_elements((2, 6, 4), of.a), 64, 96]
        assert elements[3] == {"bias": 8, "gelu": 8, "added": 96, "both": 96}.get(form)
        assert elements[4] == (8 if form == "both" else None)
        assert elements[5] == (96 if form == "gelu" else None)
        assert out is not None
        assert out.dtype == (of.stored or of.dtype)
        assert all(x.isnan().all() for x in (out, sums) if x is not None)
        assert not any(x.isnan().any() for x in (a, b, added, bias) if x is not None)
    assert len(sets) > 2
    assert not torch.equal(sets[0][0], sets[1][0])  # type: ignore[arg-type]


def test_sets_go_round_the_cache_once_or_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one = replace(LAYER, m=64, n=64, k=512, a=(0, 512, 1), b=(0, 64, 1), out=(0, 64, 1))
    bytes_of_one = 2 * (64 * 512 * 2 + 64 * 64)
    assert bytes_of_one > 3 * (1 << 14)
    assert len(bench(1 << 24, monkeypatch).argument_sets(one)) == 1
    with pytest.raises(DoesNotFit):
        bench(2 * bytes_of_one, monkeypatch).argument_sets(one)
