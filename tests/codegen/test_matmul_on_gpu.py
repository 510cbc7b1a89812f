"""The matmul template compiled and run on a CUDA device, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

import iocompiler as ioc
from iocompiler.cost_model.device import current_device
from iocompiler.cost_model.matmul_tiles import candidates
from iocompiler.plan.data import Plan
from iocompiler.plan.fold import folded, sites
from iocompiler.runtime.load import load
from tests.accuracy import relative_error

pytestmark = pytest.mark.gpu

HALF = (torch.bfloat16, torch.float16)
Shapes = tuple[tuple[int, ...], ...]
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Shapes]] = {
    "gelu": (lambda x, w, b: F.gelu(F.linear(x, w, b)), ((512, 256), (384, 256), (384,))),
    "residual": (lambda x, w, r: x @ w + r, ((1024, 512), (512, 768), (1024, 768))),
    "gated": (lambda x, w, v: F.silu(x @ w) * (x @ v), ((512, 256), (256, 384), (256, 384))),
    "odd": (lambda x, w, r: x @ w + r, ((1021, 333), (333, 511), (1021, 511))),
    "odd rows": (lambda x, w, r: x @ w + r, ((1021, 328), (328, 504), (1021, 504))),
    "odd sums": (lambda x, w, r: x @ w + r, ((512, 200), (200, 512), (512, 512))),
    "narrow": (lambda x, w, b: F.silu(F.linear(x, w, b)), ((7, 4096), (4096, 4096), (4096,))),
    "one column": (lambda x, w, r: torch.mm(x, w) + r, ((300, 64), (64, 1), (300, 1))),
    "batch": (lambda x, w, b: torch.bmm(x, w).sigmoid() + b, ((6, 200, 72), (6, 72, 136), (136,))),
    "rows as columns": (
        lambda x, w, r: x.t() @ w.t() + r.t(),
        ((256, 512), (384, 256), (384, 512)),
    ),
    "heads": (
        lambda x, w, b: F.linear(x, w, b).view(4, 128, 6, 64).transpose(1, 2).mul(0.5).contiguous(),
        ((4, 128, 256), (384, 256), (384,)),
    ),
}


def run_folded(
    f: Callable[..., Tensor], rank: int, *given: Tensor, dynamic: bool = False
) -> tuple[Tensor, int]:
    """The result with every site folded with the tile of this rank, and how many there are."""
    count = 0

    def engine(plan: Plan, gm: GraphModule) -> Any:
        nonlocal count
        row = current_device(torch.device("cuda"))
        ranked = {site.key: candidates(*site.key, row, most=12) for site in sites(plan)}
        count += len(ranked)
        chosen = {key: tiles[min(rank, len(tiles) - 1)] for key, tiles in ranked.items()}
        return load(folded(plan, chosen), torch.device(plan.device), "folded")

    torch._dynamo.reset()
    backend = ioc.Compiler(engine=engine, strict=True, cache=False)
    with torch.no_grad():
        return torch.compile(f, backend=backend, dynamic=dynamic)(*given), count


def check(f: Callable[..., Tensor], rank: int, *given: Tensor, dynamic: bool = False) -> None:
    got, count = run_folded(f, rank, *given, dynamic=dynamic)
    exact, eager = f(*(x.double() for x in given)), f(*given)
    assert count == 1
    assert got.dtype == eager.dtype
    assert relative_error(got, exact) <= 2 * relative_error(eager, exact) + 1e-5


@pytest.mark.parametrize("rank", [0, 2, 5, 9])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision(name: str, dtype: torch.dtype, rank: int) -> None:
    f, shapes = FUNCTIONS[name]
    check(f, rank, *(torch.randn(shape, device="cuda").to(dtype) for shape in shapes))


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("name", ["gelu", "gated", "odd", "batch"])
def test_float32(name: str, tf32: bool) -> None:
    f, shapes = FUNCTIONS[name]
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        check(f, 0, *(torch.randn(shape, device="cuda") for shape in shapes))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("rows", [1, 100, 1021])
def test_sizes_that_are_symbols(rows: int) -> None:
    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.silu(F.linear(x, w, b))

    shapes = ((4, rows + 1, 264), (328, 264), (328,))
    given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    check(f, 0, *given, dynamic=True)


def test_nan_and_infinity() -> None:
    x, w, r = (
        torch.randn(shape, device="cuda").bfloat16() for shape in ((100, 64), (64, 72), (100, 72))
    )
    x[3, 2], w[1, 4], r[5, 6], r[7, 8] = torch.nan, torch.inf, torch.nan, -torch.inf
    got, _ = run_folded(lambda x, w, r: torch.relu(x @ w + r), 0, x, w, r)
    expected = torch.relu(x @ w + r)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=2e-2, atol=2e-2)


def test_an_empty_sum_is_zero() -> None:
    x, w, r = (
        torch.randn(shape, device="cuda").bfloat16() for shape in ((100, 0), (0, 72), (100, 72))
    )
    got, count = run_folded(lambda x, w, r: x @ w + r, 0, x, w, r)
    assert count == 1
    assert torch.equal(got, r)


def test_operands_beyond_31_bits() -> None:
    rows, width = (1 << 31) // 4096 + 128, 4096
    if torch.cuda.mem_get_info()[0] < 6 * rows * width * 2:
        pytest.skip("needs 50 GB")
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    w, r = (
        torch.randn(width, 64, device="cuda").bfloat16(),
        torch.randn(rows, 64, device="cuda").bfloat16(),
    )
    got, _ = run_folded(lambda x, w, r: x @ w + r, 0, x, w, r)
    part = slice(rows - 256, rows)
    exact = x[part].double() @ w.double() + r[part].double()
    assert relative_error(got[part], exact) <= 1e-2
