"""Sums of products by the matmul template in Triton's interpreter, against float64."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

import iocompiler.ops.registered  # noqa: F401
from iocompiler.plan.product import MatmulTile
from iocompiler.runtime import reference
from tests.codegen.matmuls import SMALL, Folded, run_step
from tests.plan.graphs import relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, of NaN that is meant
    # Triton's interpreter in loops
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]

LARGER = replace(SMALL, m=32, n=32, k=64)
HALF = torch.float16  # the interpreter has no products of bfloat16


@pytest.fixture(autouse=True)
def through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "run_matmul", run_step)


def added(*pairs: Tensor) -> Tensor:
    return torch.ops.iocompiler.sum_of_products(list(pairs[::2]), list(pairs[1::2]))


def with_residual(r: Tensor, *pairs: Tensor) -> Tensor:
    return r + torch.tanh(added(*pairs))


def operands(m: int, n: int, *depths: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [shape for k in depths for shape in ((m, k), (k, n))]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def check(f: Any, *given: Tensor, tile: MatmulTile = SMALL, dynamic: bool = False) -> Tensor:
    compiled = Folded(tile)
    with torch.no_grad():
        got = compiled(f, dynamic=dynamic)(*given)
        eager, exact = f(*given), f(*(x.double() for x in given))
    (step,) = compiled.steps
    assert len(step.product.more) >= 1
    assert got.dtype == eager.dtype
    assert relative_error(got, exact) <= 2 * relative_error(eager, exact) + 1e-5
    return got


@pytest.mark.parametrize(
    ("m", "n", "depths", "dtype"),
    [
        (32, 32, (32, 16, 16), HALF),
        (33, 17, (20, 1001, 3), torch.float32),
        (1, 40, (16, 7), torch.float32),
        (40, 1, (7, 16), torch.float32),
        (20, 18, (0, 5), torch.float32),
    ],
)
def test_sizes(m: int, n: int, depths: tuple[int, ...], dtype: torch.dtype) -> None:
    check(added, *operands(m, n, *depths, dtype=dtype), tile=LARGER)


def test_an_epilogue() -> None:
    check(with_residual, torch.randn(33, 17), *operands(33, 17, 20, 40))


@pytest.mark.parametrize("empty", [(0, 8, (4, 4)), (8, 0, (4, 4)), (8, 8, (0, 0))])
def test_nothing_to_add(empty: tuple[int, int, tuple[int, ...]]) -> None:
    m, n, depths = empty
    compiled = Folded()
    with torch.no_grad():
        got = compiled(lambda *given: added(*given) * 2.0)(*operands(m, n, *depths))
    assert torch.equal(got, torch.zeros(m, n))


def test_operands_are_read_where_they_lie() -> None:
    def f(x: Tensor, w: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return added(x[::2, 3:19], w[:, ::3], y.t(), v.t())

    check(f, *(torch.randn(s) for s in ((40, 22), (16, 50), (9, 20), (17, 9))))


@pytest.mark.parametrize(
    "change",
    [{"programs": 3, "parts": 2, "n": 32, "group": 8}, {"n": 64, "parts": 4}],
    ids=str,
)
def test_ways_to_walk(change: dict[str, int]) -> None:
    check(added, *operands(70, 40, 40, 33), tile=replace(SMALL, **change))


@pytest.mark.parametrize(("m", "n", "depths"), [(40, 48, (32, 40, 16)), (17, 24, (8, 72))])
def test_descriptors(m: int, n: int, depths: tuple[int, ...]) -> None:
    """Operands end within a step: what is beyond them is not what begins behind them."""
    given = operands(m, n, *depths, dtype=HALF)
    tile = replace(SMALL, loads="descriptors", programs=3)
    check(with_residual, torch.randn(m, n).to(HALF), *given, tile=tile)
    given[1::2] = [w.t().contiguous().t() for w in given[1::2]]
    check(added, *given, tile=replace(tile, m=32, k=32))


def test_sizes_that_are_symbols() -> None:
    check(added, *operands(17, 20, 33, 9), dynamic=True)


def test_nan_and_infinity() -> None:
    given = operands(20, 18, 8, 16)
    given[0][3, 2], given[3][1, 4], given[2][5, 6] = torch.nan, torch.inf, -torch.inf
    check(added, *given)
