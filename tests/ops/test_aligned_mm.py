"""Odd matrix products in aligned parts are the same products."""

from __future__ import annotations

import pytest
import torch

import iocompiler.ops.aligned_mm  # noqa: F401  # registers the operator


@pytest.mark.parametrize(
    "extents", [(130, 70, 129), (64, 64, 50), (5, 7, 9), (128, 64, 128), (3, 200, 64), (1, 1, 1)]
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_is_as_accurate_as_mm(
    extents: tuple[int, int, int], transposed: bool, with_bias: bool
) -> None:
    m, k, n = extents
    a = torch.randn(m, k, dtype=torch.bfloat16)
    b = (
        torch.randn(n, k, dtype=torch.bfloat16).t()
        if transposed
        else torch.randn(k, n, dtype=torch.bfloat16)
    )
    bias = torch.randn(n, dtype=torch.bfloat16) if with_bias else None
    out = torch.ops.iocompiler.aligned_mm(a, b, bias, n + 3)
    exact = a.double() @ b.double() + (0 if bias is None else bias.double())
    eager = a @ b if bias is None else torch.addmm(bias, a, b)
    assert out.shape == (m, n)
    assert out.stride() == (n + 3, 1)
    assert (out - exact).norm() <= 2 * (eager - exact).norm() + 1e-5 * exact.norm()


def test_nothing_to_sum_gives_the_bias() -> None:
    a, b, bias = torch.empty(4, 0), torch.empty(0, 5), torch.randn(5)
    assert torch.equal(torch.ops.iocompiler.aligned_mm(a, b, bias, 5), bias.expand(4, 5))
    assert torch.equal(torch.ops.iocompiler.aligned_mm(a, b, None, 5), torch.zeros(4, 5))


def test_the_fake_implementation_promises_the_real_strides() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        a, b = torch.empty(6, 7), torch.empty(7, 9)
        out = torch.ops.iocompiler.aligned_mm(a, b, None, 16)
    assert out.stride() == (16, 1)
    assert out.fake_mode is mode
