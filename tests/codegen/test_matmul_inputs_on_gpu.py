"""Sums of products, and products of one operand, by the matmul template on a CUDA device, against
float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iocompiler as ioc
from iocompiler.compilation import Compilation
from iocompiler.ops.sum_of_products import SUM_OF_PRODUCTS
from tests.accuracy import relative_error
from tests.codegen.test_matmul_on_gpu import (
    HALF,
    Pick,
    by_descriptors,
    by_pointers,
    needs_hopper,
    ranked,
    run_folded,
)

pytestmark = pytest.mark.gpu

Results = tuple[Tensor, ...]
Shapes = tuple[tuple[int, ...], ...]


def added(*pairs: Tensor) -> Results:
    return (SUM_OF_PRODUCTS(list(pairs[::2]), list(pairs[1::2])),)


def with_residual(r: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Results:
    return (r + torch.tanh(SUM_OF_PRODUCTS([a, c], [b, d])),)


def layers(x: Tensor, q: Tensor, b: Tensor, k: Tensor, v: Tensor) -> Results:
    return F.linear(x, q, b), F.linear(x, k), F.linear(x, v)


def gradients(x: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Results:
    return dq.t() @ x, dk.t() @ x, dv.t() @ x


def pairs(m: int, n: int, *depths: int) -> Shapes:
    return tuple(shape for k in depths for shape in ((m, k), (k, n)))


def weights(m: int, k: int, *widths: int) -> Shapes:
    q, *others = widths
    return (m, k), (q, k), (q,), *((n, k) for n in others)


FUNCTIONS: dict[str, tuple[Callable[..., Results], Shapes]] = {
    "sum": (added, pairs(1024, 512, 512, 128, 128)),
    "odd sum": (added, pairs(1021, 511, 1001, 333)),
    "sum of odd rows": (added, pairs(1021, 504, 328, 72, 8)),
    "sum and kernel": (with_residual, ((512, 384), *pairs(512, 384, 256, 64))),
    "layers": (layers, weights(1024, 512, 1024, 256, 256)),
    "odd layers": (layers, weights(333, 1001, 511, 17, 3)),
    "layers of odd rows": (layers, weights(1021, 328, 504, 72, 8)),
    "gradients": (gradients, ((1024, 512), (1024, 768), (1024, 256), (1024, 256))),
    "odd gradients": (gradients, ((333, 511), (333, 70), (333, 17), (333, 3))),
}
COPIED = tuple(name for name in FUNCTIONS if not name.startswith("odd"))


def check(f: Callable[..., Results], pick: Pick, *given: Tensor, dynamic: bool = False) -> None:
    got, count = run_folded(f, pick, *given, dynamic=dynamic)  # type: ignore[arg-type]
    assert count == 1
    exact, eager = f(*(x.double() for x in given)), f(*given)
    for ours, theirs, wanted in zip(got, eager, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, wanted) <= 2 * relative_error(theirs, wanted) + 1e-5


def rand(shapes: Shapes, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]


@pytest.mark.parametrize("pick", [ranked(0), ranked(3), by_pointers], ids=["0", "3", "pointers"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision(name: str, dtype: torch.dtype, pick: Pick) -> None:
    f, shapes = FUNCTIONS[name]
    check(f, pick, *rand(shapes, dtype))


@needs_hopper
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", COPIED)
def test_descriptors(name: str, dtype: torch.dtype) -> None:
    f, shapes = FUNCTIONS[name]
    check(f, by_descriptors, *rand(shapes, dtype))


@pytest.mark.parametrize("name", ["sum", "layers", "odd gradients"])
def test_float32(name: str) -> None:
    f, shapes = FUNCTIONS[name]
    check(f, ranked(0), *rand(shapes, torch.float32))


@needs_hopper
@pytest.mark.parametrize("name", ["sum", "layers"])
def test_pointers_that_are_not_aligned(name: str) -> None:
    f, shapes = FUNCTIONS[name]
    given = []
    for shape in shapes:
        flat = torch.randn(torch.Size(shape).numel() + 1, device="cuda", dtype=torch.bfloat16)
        given.append(flat[1:].view(shape))
    check(f, by_descriptors, *given)


@pytest.mark.parametrize("name", ["sum of odd rows", "layers of odd rows", "gradients"])
def test_sizes_that_are_symbols(name: str) -> None:
    f, shapes = FUNCTIONS[name]
    check(f, ranked(0), *rand(shapes), dynamic=True)


@pytest.mark.parametrize("pick", [ranked(0), by_pointers])
def test_what_is_not_finite_stays_in_its_product(pick: Pick) -> None:
    f, shapes = FUNCTIONS["layers"]
    given = rand(shapes)
    given[1][3, 2], given[3][5, 6] = torch.nan, torch.inf
    got, _ = run_folded(f, pick, *given)  # type: ignore[arg-type]
    for ours, theirs in zip(got, f(*given), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=2e-2, atol=0.3)


class Attention(nn.Module):
    """Queries of more heads than keys and values, and a gated layer: with what is left of a norm
    around them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(512, n, bias=False) for n in (512, 128, 128))
        self.gate, self.up = (nn.Linear(512, 1024, bias=False) for _ in range(2))
        self.down = nn.Linear(1024, 512, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, (512,))
        q, k, v = (f(y).unflatten(-1, (-1, 64)).transpose(1, 2) for f in (self.q, self.k, self.v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + z.transpose(1, 2).flatten(2)
        y = F.rms_norm(x, (512,))
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@pytest.mark.parametrize("mode", ["default", "max-autotune", "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_training_step(mode: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Attention().cuda().bfloat16()
    wide = Attention().cuda().double()
    wide.load_state_dict(model.state_dict())
    records: list[Compilation] = []
    backend: Any = ioc.Compiler(mode=mode, strict=True, cache=False, on_compiled=records.append)
    run = torch.compile(model, backend=backend, dynamic=dynamic)
    for rows in (256, 384) if dynamic else (256,) * 4:
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(2, rows, 512, device="cuda", dtype=torch.bfloat16)
        found = []
        for f, own, given in ((run, model, x), (model, model, x), (wide, wide, x.double())):
            given = given.clone().requires_grad_()
            y = f(given)
            grads = torch.autograd.grad(y.square().sum(), [given, *own.parameters()])
            found.append([each.clone() for each in (y, *grads)])
        for place, (ours, theirs, exact) in enumerate(zip(*found, strict=True)):
            allowed = (3 if place else 2) * relative_error(theirs, exact) + 1e-5
            assert relative_error(ours, exact) <= allowed, place
    found_sums = [r for r in records[0].rewrites if r.pattern == "sum_of_products"]
    assert sorted(r.variant for r in found_sums) == ["2 products", "3 products"]
