"""Programs that say by torch's newer setting what float32 products may be rounded to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iocompiler
from iocompiler.tf32 import convolutions_rounded, products_rounded
from tests.compiling import check

MATMUL: Any = torch.backends.cuda.matmul
CONV: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = MATMUL.fp32_precision, CONV.fp32_precision
    yield
    MATMUL.fp32_precision, CONV.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"


class Products(nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.relu(x @ w).softmax(-1)


@pytest.mark.parametrize(("precision", "rounded"), [("tf32", True), ("ieee", False)])
def test_the_newer_setting_is_read(precision: str, rounded: bool) -> None:
    MATMUL.fp32_precision, CONV.fp32_precision = precision, precision
    assert (products_rounded(), convolutions_rounded()) == (rounded, rounded)


def test_the_older_settings_are_read() -> None:
    assert not products_rounded()
    assert convolutions_rounded()
    torch.set_float32_matmul_precision("high")
    assert products_rounded()
    torch.set_float32_matmul_precision("highest")
    assert not products_rounded()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert not convolutions_rounded()


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_a_plan_is_made_and_priced(precision: str) -> None:
    """Reading the older setting raises then: the graph fell back to aten."""
    MATMUL.fp32_precision = precision
    given = torch.randn(4096, 4096), torch.randn(4096, 4096)
    report = iocompiler.explain(Products(), *given, device="h100")
    assert not report.fallbacks
    product = next(kernel for kernel in report.kernels if "mm" in kernel.name)
    assert (product.time_us < 1000) == (precision == "tf32")


def test_a_compilation_runs() -> None:
    MATMUL.fp32_precision = "tf32"
    check(Products(), torch.randn(8, 8), torch.randn(8, 8), engine="reference")
