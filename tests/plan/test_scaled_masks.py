"""(x keep) s, as a dropout is written, is one product of x: the same numbers to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iocompiler.plan.data import KernelStep
from tests.plan.graphs import Planned

EDGES = [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 3e38, -1e-45, 1.5, -2.5, 1e-3]


def products(planned: Planned) -> int:
    """How many products of floats the kernels have."""
    return sum(
        op.kind == "map" and op.fn == "mul" and op.dtype.is_floating_point
        for plan in planned.plans
        for step in plan.steps
        if isinstance(step, KernelStep)
        for op in step.program.ops
    )


@pytest.mark.parametrize("scale", [1 / 0.9, -2.0, 0.0, float("inf"), 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_masked_product_is_one(dtype: torch.dtype, scale: float) -> None:
    x = torch.tensor(EDGES * 2, dtype=dtype)
    keep = torch.arange(20) < 10
    planned = Planned()
    got = planned(lambda x, keep: x * keep * scale)(x, keep)
    want = x * keep * scale
    assert products(planned) == 1
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    assert torch.equal(got.signbit()[~got.isnan()], want.signbit()[~want.isnan()])


def test_what_is_no_mask_stays_two_products() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        return x * y * 1.1

    x, y = torch.randn(20), torch.randn(20)
    for given in ((x, y), (x, torch.arange(20))):
        planned = Planned()
        torch.testing.assert_close(planned(f)(*given), f(*given))
        assert products(planned) == 2


def test_what_else_reads_the_masked_product_has_it() -> None:
    def f(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        masked = x * keep
        return masked, masked * 1.1

    x, keep = torch.randn(20), torch.arange(20) % 3 > 0
    for got, want in zip(Planned()(f)(x, keep), f(x, keep), strict=True):
        assert torch.equal(got, want)
