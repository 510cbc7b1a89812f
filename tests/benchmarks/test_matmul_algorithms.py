"""The benchmark of the library's algorithms, without a GPU: the products of a model's step, aten's
calls, and a line measured by a bench that makes up the times.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import matmul_algorithms
from benchmarks.matmul_algorithms import by_aten, measure, rows
from benchmarks.model_zoo import MODELS
from iocompiler.cost_model.device import DEVICES
from iocompiler.ops.library_product import Algorithm, Problem
from iocompiler.runtime.measure_products import _buffers
from iocompiler.runtime.products import supported
from iocompiler.runtime.stimulus import tensor_for

BF16 = torch.bfloat16
CPU = torch.device("cpu")
PLAIN = Problem(1, 6, 8, 4, BF16, (0, 4, 1), (0, 1, 4), (0, 8, 1))
MANY = Problem(2, 6, 8, 4, BF16, (24, 4, 1), (32, 1, 4), (48, 8, 1))


def algorithm(number: int) -> Algorithm:
    return Algorithm(66, number, 1, 0, 0, 0, 36, 0, 2)


def test_the_products_of_a_step() -> None:
    found = list(rows(MODELS["gpt2"], DEVICES["h100"], quick=True))
    assert len({problem for problem, _ in found}) == len(found) > 10
    assert all(supported(problem) for problem, _ in found)
    counts = [int(str(line["times"])) for _, line in found]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == 2 * (4 + 8) + 3  # layers, forward and backward, and the head
    assert any("bias, gelu, sums kept" in str(line["name"]) for _, line in found)


@pytest.mark.parametrize("of", [PLAIN, MANY], ids=["one", "many"])
@pytest.mark.parametrize("form", ["plain", "bias", "added", "relu"])
def test_aten_s_call(of: Problem, form: str) -> None:
    changed: dict[str, Any] = {
        "bias": {"added": (0, 0, 1)},
        "added": {"added": of.out},
        "relu": {"added": (0, 0, 1), "activation": "relu"},
    }.get(form, {})
    of = Problem(**{**vars(of), **changed})
    given = [
        None if b is None else tensor_for(b, int(b.elements), None, CPU, seed)
        for seed, b in enumerate(_buffers(of))
    ]
    if form == "relu" and of.batch > 1:
        assert not by_aten(of, [given])
        return
    (call,) = by_aten(of, [given])
    call()
    a, b, out, added = given[:4]
    assert a is not None
    assert b is not None
    assert out is not None
    left, right = (
        x.as_strided((of.batch, *shape), strides).double()
        for x, shape, strides in ((a, (6, 4), of.a), (b, (4, 8), of.b))
    )
    summand: Tensor | float = 0.0
    if added is not None:
        summand = added if of.biased else added.view(of.batch, 6, 8)
    expected = (left @ right + summand).to(BF16)
    expected = expected.relu() if form == "relu" else expected
    torch.testing.assert_close(out.as_strided((of.batch, 6, 8), MANY.out), expected)


def test_forms_that_aten_has_no_call_for() -> None:
    both = {**vars(PLAIN), "added": (0, 8, 1), "bias": True}
    gelu = {**vars(PLAIN), "sums": (0, 8, 1), "activation": "gelu"}
    assert not by_aten(Problem(**both), [[]])
    assert not by_aten(Problem(**gelu), [[]])


class Made:
    """Proposes three."""

    def __init__(self, proposed: int = 3) -> None:
        self.count = proposed

    def proposed(self, problem: Problem) -> Sequence[Algorithm]:
        return [algorithm(number) for number in range(self.count)]

    def argument_sets(self, problem: Problem) -> list[Any]:
        return []

    def calls(self, problem: Problem, each: Algorithm, sets: Any) -> list[Any]:
        return [each.tile]


@pytest.mark.parametrize(
    ("seconds", "rank"), [((2.0, 1.0, 4.0), 1), ((1.0, 0.999, 2.0), 0), ((2.0, None, 1.0), 2)]
)
def test_a_line(
    seconds: tuple[float | None, ...], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul_algorithms, "in_turns", lambda ways: [4.0, *seconds])
    line: Any = {}
    measure(line, PLAIN, Made())  # type: ignore[arg-type]
    first, best = seconds[0], seconds[rank]
    assert first is not None
    assert best is not None
    assert (line["rank"], line["proposed"]) == (rank, 3)
    assert (line["first us"], line["chosen us"], line["aten us"]) == (first * 1e6, best * 1e6, 4e6)
    assert line["chosen/aten"] == best / 4.0


def test_a_product_without_an_algorithm_is_a_note() -> None:
    line: Any = {}
    measure(line, PLAIN, Made(0))  # type: ignore[arg-type]
    assert "no algorithm" in line["note"]


def test_a_whole_run_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"only": "vit", "quick": True, "limit": 100.0, "json": None}
    matmul_algorithms.run(argparse.Namespace(**settings))
    shown = capsys.readouterr().out
    assert "vit: distinct products: 19" in shown
    assert "failed" not in shown
