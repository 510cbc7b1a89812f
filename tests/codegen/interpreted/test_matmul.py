"""The matmul template in Triton's interpreter: whole plans, against float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

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


@pytest.fixture(autouse=True)
def through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "run_matmul", run_step)


def check(
    f: Callable[..., Tensor],
    *inputs: Tensor,
    tile: MatmulTile = SMALL,
    dynamic: bool = False,
    steps: int = 1,
) -> None:
    """As accurate as eager is in the dtype of the inputs, gradients too."""
    compiled = Folded(tile)
    runs = ((compiled(f, dynamic=dynamic), False), (f, False), (f, True))
    ours, eager, exact = (_results(run, inputs, wide) for run, wide in runs)
    assert len(compiled.steps) == steps
    for got, theirs, wanted in zip(ours, eager, exact, strict=True):
        assert got.dtype == theirs.dtype
        assert relative_error(got, wanted) <= 2 * relative_error(theirs, wanted) + 1e-5


def _results(run: Callable[..., Tensor], inputs: tuple[Tensor, ...], wide: bool) -> list[Tensor]:
    given = [x.detach().double() if wide else x.detach().clone() for x in inputs]
    given = [
        x.as_strided(x.shape, old.stride()) if x.stride() != old.stride() else x
        for x, old in zip(given, inputs, strict=True)
    ]
    leaves = [x.requires_grad_(old.requires_grad) for x, old in zip(given, inputs, strict=True)]
    result = run(*given)
    wanted = [x for x in leaves if x.requires_grad]
    if not wanted:
        return [result]
    weight = torch.arange(result.numel()).reshape(result.shape).sin().to(result.dtype)
    return [result, *torch.autograd.grad(result, wanted, weight)]


def rand(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def gelu_backward(x: Tensor, w: Tensor, h: Tensor) -> Tensor:
    """The gradient before an activation, and below it that of the bias."""
    d = torch.ops.aten.gelu_backward(x @ w, h)
    return torch.cat([d, d.sum(0, keepdim=True)])


def bias_silu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.silu(F.linear(x, w, b))


def residual(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    return x @ w + r


def gated(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.silu(x @ w) * (x @ v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # no bf16 products
def test_dtypes(dtype: torch.dtype) -> None:
    check(bias_silu, *(rand(*s, dtype=dtype) for s in ((32, 32), (32, 32), (32,))))


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(33, 17, 20), (1, 40, 16), (40, 1, 7), (1, 1, 2), (16, 48, 3), (50, 16, 33), (9, 9, 0)],
)
def test_odd_sizes(m: int, n: int, k: int) -> None:
    check(residual, rand(m, k), rand(k, n), rand(m, n))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_operands_are_read_where_they_lie(left: bool, right: bool) -> None:
    x = rand(20, 33).t() if left else rand(33, 20)
    w = rand(17, 20).t() if right else rand(20, 17)
    check(residual, x, w, rand(17, 33).t())


def test_strided_operands() -> None:
    def f(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
        return x[::2, 3:19] @ w[:, ::3] + r

    check(f, rand(40, 22), rand(16, 50), rand(20, 17))


def test_a_batch() -> None:
    def f(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
        return torch.bmm(x, w.transpose(1, 2)).mul(0.5) + r[:, None]

    check(f, rand(3, 18, 20), rand(3, 17, 20), rand(3, 17))


def test_what_is_added_to_a_batch() -> None:
    check(lambda x, w, r: F.silu(torch.baddbmm(r, x, w)), rand(2, 5, 7), rand(2, 7, 9), rand(5, 1))


@pytest.mark.parametrize(
    "change",
    [{"programs": 3, "parts": 2, "group": 8}, {"m": 32, "k": 32}, {"n": 64, "parts": 4}],
    ids=str,
)
def test_ways_to_walk(change: dict[str, int]) -> None:
    tile = replace(SMALL, **change)
    check(bias_silu, rand(40, 40), rand(34, 40), rand(34), tile=tile)
    check(gated, rand(34, 20), rand(20, 33), rand(20, 33), tile=tile)


def test_gradients() -> None:
    check(bias_silu, rand(20, 16, grad=True), rand(18, 16, grad=True), rand(18, grad=True))
    # the gate, its gradient, those of both weights in one launch
    check(gated, *(rand(*s, grad=True) for s in ((20, 16), (16, 18), (16, 18))), steps=3)


def test_rows_that_others_see_as_more_dims() -> None:
    def f(x: Tensor, w: Tensor, mask: Tensor) -> Tensor:
        heads = (x @ w).view(2, 9, 4, 5).transpose(1, 2)
        return torch.where(mask > 0, heads * 0.25, 0.0)

    check(f, rand(2, 9, 8), rand(8, 20), torch.arange(18.0).reshape(2, 1, 9, 1) % 3)


def test_sizes_that_are_symbols() -> None:
    check(bias_silu, rand(2, 17, 20), rand(33, 20), rand(33), dynamic=True)


def test_nan_and_infinity() -> None:
    x, w, r = rand(20, 8), rand(8, 18), rand(20, 18)
    x[3, 2], w[1, 4], r[5, 6], r[7, 8] = torch.nan, torch.inf, torch.nan, -torch.inf
    check(lambda x, w, r: torch.relu(x @ w + r), x, w, r)


def test_an_argument_is_overwritten() -> None:
    def f(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
        r.add_(x @ w)
        return r * 1.0

    check(f, rand(20, 8), rand(8, 18), rand(20, 18))


@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
@pytest.mark.parametrize("transposed", [False, True])
def test_halves_of_one_product(loads: str, transposed: bool) -> None:
    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        value, gate = F.linear(x, w, b).chunk(2, -1)
        return value * torch.sigmoid(gate)

    w = rand(24, 40).t() if transposed else rand(40, 24)
    check(f, rand(2, 18, 24), w, rand(40), tile=replace(SMALL, programs=3, loads=loads))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_descriptors(left: bool, right: bool) -> None:
    tile = replace(SMALL, programs=3, parts=2, n=32, loads="descriptors")
    x = rand(20, 36).t() if left else rand(36, 20)
    w = rand(40, 20).t() if right else rand(20, 40)
    check(residual, x, w, rand(36, 40), tile=tile)


def test_descriptors_of_two_products() -> None:
    tile = replace(SMALL, programs=2, loads="descriptors")
    check(gated, rand(33, 24), rand(24, 36), rand(36, 24).t(), tile=tile)


@pytest.mark.parametrize("rows", [4096, 4096 + 64])
@pytest.mark.parametrize("change", [{}, {"parts": 2, "n": 32}, {"loads": "descriptors", "n": 32}])
def test_sums_down_the_columns(rows: int, change: dict[str, Any]) -> None:
    tile = replace(SMALL, m=128, programs=3, **change)
    check(gelu_backward, rand(rows, 24), rand(24, 40), rand(rows, 40), tile=tile)
