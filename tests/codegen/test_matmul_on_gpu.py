"""The matmul template compiled and run on a CUDA device, against float64."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

import iocompiler as ioc
from iocompiler import engines, scheduling
from iocompiler.compilation import Compilation
from iocompiler.cost_model.device import current_device
from iocompiler.cost_model.matmul_tiles import candidates
from iocompiler.options import Options
from iocompiler.patience import Patience
from iocompiler.plan.data import MatmulStep, Plan
from iocompiler.plan.fold import folded
from iocompiler.plan.product import MatmulTile
from iocompiler.plan.sites import sites
from tests.accuracy import relative_error
from tests.codegen.matmuls import tf32

pytestmark = pytest.mark.gpu


def halves(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    value, gate = F.linear(x, w, b).chunk(2, -1)
    return value * F.gelu(gate)


Pick = Callable[[list[MatmulTile]], MatmulTile]
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs the copy engine of Hopper",
)
# what its copy engine takes
COPIED = (
    "gelu",
    "residual",
    "gated",
    "halves",
    "odd rows",
    "odd sums",
    "narrow",
    "rows as columns",
    "heads",
)
HALF = (torch.bfloat16, torch.float16)
Shapes = tuple[tuple[int, ...], ...]
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Shapes]] = {
    "gelu": (lambda x, w, b: F.gelu(F.linear(x, w, b)), ((512, 256), (384, 256), (384,))),
    "residual": (lambda x, w, r: x @ w + r, ((1024, 512), (512, 768), (1024, 768))),
    "gated": (lambda x, w, v: F.silu(x @ w) * (x @ v), ((512, 256), (256, 384), (256, 384))),
    "halves": (halves, ((512, 256), (768, 256), (768,))),
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
    f: Callable[..., Tensor], pick: Pick, *given: Tensor, dynamic: bool | None = False
) -> tuple[Tensor, int]:
    """The result with every site folded, where measurements choose otherwise, and their number."""
    count = 0

    def tuned(
        plan: Plan, gm: GraphModule, options: Options, patience: Patience
    ) -> tuple[Plan, tuple[()]]:
        nonlocal count
        row = engines.device_row(gm, options)
        chosen = {site.key: pick(candidates(*site.key, row, most=1000)) for site in sites(plan)}
        count += len(chosen)
        return folded(plan, chosen), ()

    torch._dynamo.reset()
    backend = ioc.Compiler(strict=True, cache=False)
    with torch.no_grad(), patch.object(scheduling, "tuned", tuned):
        return torch.compile(f, backend=backend, dynamic=dynamic)(*given), count


def ranked(rank: int) -> Pick:
    return lambda tiles: tiles[min(rank, len(tiles) - 1)]


def by_descriptors(tiles: list[MatmulTile]) -> MatmulTile:
    return next(tile for tile in tiles if tile.loads == "descriptors")


def check(
    f: Callable[..., Tensor],
    pick: Pick,
    *given: Tensor,
    dynamic: bool | None = False,
    folds: bool = True,
) -> None:
    got, count = run_folded(f, pick, *given, dynamic=dynamic)
    exact, eager = f(*(x.double() for x in given)), f(*given)
    assert count == folds
    assert got.dtype == eager.dtype
    assert relative_error(got, exact) <= 2 * relative_error(eager, exact) + 1e-5


@pytest.mark.parametrize("rank", [0, 2, 5, 9])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision(name: str, dtype: torch.dtype, rank: int) -> None:
    f, shapes = FUNCTIONS[name]
    check(f, ranked(rank), *(torch.randn(shape, device="cuda").to(dtype) for shape in shapes))


@needs_hopper
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", COPIED)
def test_descriptors(name: str, dtype: torch.dtype) -> None:
    f, shapes = FUNCTIONS[name]
    check(f, by_descriptors, *(torch.randn(shape, device="cuda").to(dtype) for shape in shapes))


@needs_hopper
@pytest.mark.parametrize("pick", [ranked(0), by_descriptors])
def test_pointers_that_are_not_aligned(pick: Pick) -> None:
    f, shapes = FUNCTIONS["residual"]
    given = []
    for rows, columns in shapes:
        flat = torch.randn(rows * columns + 1, device="cuda", dtype=torch.bfloat16)
        given.append(flat[1:].view(rows, columns))
    assert all(x.data_ptr() % 16 for x in given)
    check(f, pick, *given)
    check(f, pick, *(x.clone() for x in given))


@needs_hopper
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_by_price(mode: str) -> None:
    """What a kernel makes descriptors in is the graph's own memory: each replay makes them anew."""
    if current_device(torch.device("cuda")).matmul_template is None:
        pytest.skip("the template was not measured here")

    def f(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return x * torch.sigmoid(F.gelu(F.linear(x, w, b)) @ v)

    shapes = ((8192, 512), (2048, 512), (2048,), (2048, 512))
    x, *weights = (torch.randn(shape, device="cuda").mul(0.1).bfloat16() for shape in shapes)
    records: list[Compilation] = []
    torch._dynamo.reset()
    backend = ioc.Compiler(mode=mode, strict=True, cache=False, on_compiled=records.append)
    run = torch.compile(f, backend=backend)
    with torch.no_grad():
        for scale in (1.0, 2.0, 3.0, 4.0):  # two runs before one is recorded, then replays
            torch.compiler.cudagraph_mark_step_begin()
            given = (x * scale, *weights)
            got = run(*given).clone()
            exact = f(*(each.double() for each in given))
            assert relative_error(got, exact) <= 2 * relative_error(f(*given), exact) + 1e-5
    (record,) = records
    steps = [s for s in record.plans["inference"].steps if isinstance(s, MatmulStep)]
    assert len(steps) == 2
    assert any(step.tile.loads == "descriptors" for step in steps)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", ["gelu", "gated", "odd", "batch"])
def test_float32(name: str, rounded: bool) -> None:
    """In TF32 products are the library's, and as exact as it is."""
    f, shapes = FUNCTIONS[name]
    given = [torch.randn(shape, device="cuda") for shape in shapes]
    with tf32(rounded):
        check(f, ranked(0), *given, folds=not rounded)


@pytest.mark.parametrize("rows", [1, 100, 1021])
def test_sizes_that_are_symbols(rows: int) -> None:
    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.silu(F.linear(x, w, b))

    shapes = ((4, rows + 1, 264), (328, 264), (328,))
    given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    check(f, ranked(0), *given, dynamic=True)


@needs_hopper
@pytest.mark.parametrize("rows", [3, 1021])
def test_rows_that_are_a_symbol(rows: int) -> None:
    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.silu(F.linear(x, w, b))

    shapes = ((rows, 264), (328, 264), (328,))
    x, w, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    torch._dynamo.mark_dynamic(x, 0)
    check(f, by_descriptors, x, w, b, dynamic=None)


def with_column_sums(x: Tensor, w: Tensor, h: Tensor) -> Tensor:
    d = torch.ops.aten.gelu_backward(x @ w, h)
    return torch.cat([d, d.sum(0, keepdim=True)])


def by_pointers(tiles: list[MatmulTile]) -> MatmulTile:
    return next(tile for tile in tiles if tile.loads == "pointers")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("pick", [ranked(0), ranked(4), by_pointers])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 768), (4096 + 64, 264), (8192, 48)])
def test_sums_down_the_columns(rows: int, columns: int, pick: Pick, dtype: torch.dtype) -> None:
    """Gradients of an activation and of the bias before it, in whole and in half tiles."""
    shapes = ((rows, 200), (200, columns), (rows, columns))
    given = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    check(with_column_sums, pick, *given)
    once, again = (run_folded(with_column_sums, pick, *given)[0] for _ in range(2))
    assert torch.equal(once, again)


def test_sums_of_what_is_not_finite() -> None:
    given = [torch.randn(s, device="cuda").bfloat16() for s in ((4096, 64), (64, 72), (4096, 72))]
    given[2][5, 6], given[2][4095, 8], given[0][9] = torch.nan, torch.inf, -torch.inf
    got, count = run_folded(with_column_sums, ranked(0), *given)
    assert count == 1
    expected = with_column_sums(*given)
    assert torch.equal(got.isfinite(), expected.isfinite())
    kept = expected.isfinite().all(0)
    torch.testing.assert_close(got[:, kept], expected[:, kept], rtol=2e-2, atol=0.5)


def test_nan_and_infinity() -> None:
    x, w, r = (
        torch.randn(shape, device="cuda").bfloat16() for shape in ((100, 64), (64, 72), (100, 72))
    )
    x[3, 2], w[1, 4], r[5, 6], r[7, 8] = torch.nan, torch.inf, torch.nan, -torch.inf
    got, _ = run_folded(lambda x, w, r: torch.relu(x @ w + r), ranked(0), x, w, r)
    expected = torch.relu(x @ w + r)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=2e-2, atol=2e-2)


def test_an_empty_sum_is_zero() -> None:
    x, w, r = (
        torch.randn(shape, device="cuda").bfloat16() for shape in ((100, 0), (0, 72), (100, 72))
    )
    got, count = run_folded(lambda x, w, r: x @ w + r, ranked(0), x, w, r)
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
    got, _ = run_folded(lambda x, w, r: x @ w + r, ranked(0), x, w, r)
    part = slice(rows - 256, rows)
    exact = x[part].double() @ w.double() + r[part].double()
    assert relative_error(got[part], exact) <= 1e-2
