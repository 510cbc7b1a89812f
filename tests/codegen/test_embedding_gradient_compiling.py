"""The templates for the gradient of an embedding table compile with no GPU and spill nothing."""

from __future__ import annotations

import pytest
import torch

from iocompiler.runtime import embedding_gradient
from tests.codegen.template_compiling import launched

COUNTED = {"embedding_order", "embedding_sums", "embedding_fold"}
SORTED = {"embedding_keys", "embedding_sums", "embedding_fold"}


def resources(
    monkeypatch: pytest.MonkeyPatch, capability: int, dtype: torch.dtype, tokens: int, width: int
) -> dict[str, dict[str, int]]:
    """Of each kernel, as `launched` has them."""
    found = launched(monkeypatch, capability)
    table, grad = torch.empty(50, width, dtype=dtype), torch.empty(tokens, width, dtype=dtype)
    indices = torch.zeros(tokens, dtype=torch.int64)
    embedding_gradient.accumulate(table, grad, indices, -1, added=True)
    return found


@pytest.mark.parametrize(
    ("dtype", "tokens", "width", "kernels"),
    [(torch.bfloat16, 8192, 1024, COUNTED), (torch.float32, 40000, 37, SORTED)],
)
def test_nothing_spills(
    dtype: torch.dtype,
    tokens: int,
    width: int,
    kernels: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = resources(monkeypatch, 90, dtype, tokens, width)
    assert found.keys() == kernels
    assert not any(each["spills"] for each in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 37, 768])
@pytest.mark.parametrize("tokens", [100, 3000, 16000])
def test_every_size_compiles(
    capability: int, dtype: torch.dtype, width: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = resources(monkeypatch, capability, dtype, tokens, width)
    assert not any(each["spills"] for each in found.values()), found
