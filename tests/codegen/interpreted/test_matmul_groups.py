"""Products of one operand in one launch, in Triton's interpreter, against float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.plan.product import MatmulTile
from iocompiler.runtime import reference
from tests.codegen.matmuls import SMALL, Folded, run_step
from tests.plan.graphs import relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, of NaN that is meant
    # Triton's interpreter in loops
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]

HALF = torch.float16  # the interpreter has no products of bfloat16
LARGER = replace(SMALL, m=32, n=32, k=64)
Function = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "run_matmul", run_step)


def layers(x: Tensor, q: Tensor, b: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """One of three has a bias."""
    return F.linear(x, q, b), F.linear(x, k), F.linear(x, v)


def gradients(x: Tensor, *tangents: Tensor) -> tuple[Tensor, ...]:
    return tuple(tangent.t() @ x for tangent in tangents)


def rand(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def check(f: Function, *given: Tensor, tile: MatmulTile = SMALL, dynamic: bool = False) -> None:
    compiled = Folded(tile)
    with torch.no_grad():
        ours = compiled(f, dynamic=dynamic)(*given)
        eager, exact = f(*given), f(*(x.double() for x in given))
    (step,) = compiled.steps
    assert len(step.parts) == len(ours)
    for got, theirs, wanted in zip(ours, eager, exact, strict=True):
        assert got.dtype == theirs.dtype
        assert relative_error(got, wanted) <= 2 * relative_error(theirs, wanted) + 1e-5


def shapes_of(rows: int, depth: int, widths: tuple[int, int, int]) -> tuple[tuple[int, ...], ...]:
    q, k, v = widths
    return (rows, depth), (q, depth), (q,), (k, depth), (v, depth)


@pytest.mark.parametrize(
    ("rows", "depth", "widths", "dtype"),
    [
        (32, 32, (64, 16, 16), HALF),
        (33, 1001, (40, 17, 3), torch.float32),
        (1, 7, (16, 1, 33), torch.float32),
    ],
)
def test_layers_of_one_input(
    rows: int, depth: int, widths: tuple[int, int, int], dtype: torch.dtype
) -> None:
    check(layers, *rand(*shapes_of(rows, depth, widths), dtype=dtype), tile=LARGER)


def test_gradients_of_their_weights() -> None:
    tile = replace(SMALL, programs=2)
    check(gradients, *rand((33, 20), (33, 40), (33, 17), (33, 3)), tile=tile)


@pytest.mark.parametrize("widths", [(64, 16, 16), (40, 24, 8)])
def test_descriptors(widths: tuple[int, int, int]) -> None:
    tile = replace(SMALL, m=32, n=32, k=32, loads="descriptors", programs=3, parts=2)
    check(layers, *rand(*shapes_of(33, 40, widths), dtype=HALF), tile=tile)
    tangents = [(40, width) for width in widths]
    check(gradients, *rand((40, 24), *tangents, dtype=HALF), tile=replace(tile, parts=1))


def test_sizes_that_are_symbols() -> None:
    check(layers, *rand(*shapes_of(17, 20, (33, 5, 9))), tile=LARGER, dynamic=True)


@pytest.mark.parametrize("empty", [(0, 8), (9, 0)])
def test_nothing_to_compute(empty: tuple[int, int]) -> None:
    rows, depth = empty
    given = rand(*shapes_of(rows, depth, (8, 4, 4)))
    with torch.no_grad():
        for got, wanted in zip(Folded()(layers)(*given), layers(*given), strict=True):
            assert torch.equal(got, wanted)


def test_nan_and_infinity_stay_in_their_product() -> None:
    given = rand(*shapes_of(20, 8, (18, 16, 5)))
    given[1][3, 2], given[2][4], given[3][5, 6] = torch.nan, torch.inf, -torch.inf
    check(layers, *given, tile=LARGER)
