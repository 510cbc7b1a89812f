"""Orders of storage chosen for a graph: what changes, what does not, results, gradients, strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iocompiler as ioc
from iocompiler.compilation import Compilation
from iocompiler.graph.findings import Rewrite
from iocompiler.ops import target
from tests.passes.layout_cases import (
    BF16,
    Bottleneck,
    Chain,
    Classifier,
    Several,
    Shared,
    Squeezed,
    Tokens,
    UNet,
    Volume,
    check,
    compiler,
    launches_for_free,
    reasons,
    variants,
)

aten = torch.ops.aten
TAKEN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual block": (Bottleneck, (2, 32, 6, 5)),
    "skip": (UNet, (2, 16, 8, 6)),
    "classifier": (Classifier, (3, 8, 16, 16)),
    "tokens": (Tokens, (2, 16, 5, 4)),
    "squeezed": (Squeezed, (2, 16, 5, 4)),
    "shared weight": (Shared, (2, 16, 5, 4)),
    "several results": (Several, (2, 16, 5, 4)),
    "volumes": (Volume, (2, 8, 4, 3, 5)),
    "one place": (lambda: Chain(16, 32, 16, kernel=1), (2, 16, 6, 6)),
}


@pytest.fixture
def gpu() -> Iterator[None]:
    with launches_for_free():
        yield


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str, train: bool) -> None:
    make, shape = TAKEN[name]
    records = check(make, *shape, train=train)
    assert variants(records)
    assert not reasons(records) or name == "squeezed"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["residual block", "skip"])
def test_float32_in_tf32(name: str) -> None:
    make, shape = TAKEN[name]
    assert variants(check(make, *shape, dtype=torch.float32))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["residual block", "skip", "classifier", "tokens", "squeezed"])
def test_any_batch_and_size(name: str) -> None:
    make, shape = TAKEN[name]
    records: list[Compilation] = []
    torch.manual_seed(0)
    module = make().to(BF16).eval()
    run = compiler(records, dynamic=True)(module)
    batch, channels, *places = shape
    for more in (0, 2, 6):
        x = torch.randn(batch + more, channels, *(p + more for p in places)).to(BF16)
        with torch.no_grad():
            found, expected = run(x), module(x)
        assert found.stride() == expected.stride()
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    assert len(records) == 1, "a guard on a size"
    assert variants(records)
