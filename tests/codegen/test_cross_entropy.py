"""The row kernel of linear + cross-entropy compiles with no GPU, in registers that are there."""

from __future__ import annotations

import pytest
import torch

from iocompiler.ops.linear_cross_entropy_rows import (
    Piece,
    Rows,
    Setting,
    launch_rows,
    reference_rows,
)
from iocompiler.ops.linear_cross_entropy_walk import LINE, of_row
from tests.codegen.template_compiling import launched


def _resources(
    vocabulary: int,
    dtype: torch.dtype,
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
    setting: Setting,
    rows_of: Rows,
    **more: torch.Tensor,
) -> dict[str, int]:
    """Of the kernel with a gradient in place."""
    kernels = launched(monkeypatch, capability)
    logits = torch.empty(2, -(-vocabulary // 64) * 64, dtype=dtype)
    target, losses = torch.zeros(2, dtype=torch.int64), torch.empty(2)
    launch_rows(Piece(logits[:, :vocabulary], target, losses, logits, **more), rows_of, setting)
    (found,) = kernels.values()
    return found


@pytest.mark.parametrize(("vocabulary", "rows"), [(30522, 2), (50257, 2), (128256, 1)])
def test_rows_share_a_multiprocessor(
    vocabulary: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _resources(vocabulary, torch.bfloat16, 90, monkeypatch, Setting(), Rows())
    assert found["spills"] == 0, found
    assert rows * 32 * found["warps"] * found["registers"] <= 65536, found


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocabulary", [1, 8191, 32768, 65600])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_every_walk_compiles(
    vocabulary: int,
    dtype: torch.dtype,
    capability: int,
    capped: bool,
    full: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting, rows_of, more = Setting(capped=capped), Rows(), {}
    if full:
        setting = Setting(smoothing=0.1, outer=-2.0, inner=0.1, capped=capped)
        rows_of = Rows(torch.empty(2), torch.empty(2))
        more = {"copy": torch.empty(2, vocabulary)}
        more = {name: each.to(dtype) for name, each in more.items()}
    found = _resources(vocabulary, dtype, capability, monkeypatch, setting, rows_of, **more)
    assert found["spills"] <= (32 if capped or full else 0), found


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_element_is_walked_over(itemsize: int, copied: bool) -> None:
    for vocabulary in [*range(1, 300), *range(301, 300_000, 977)]:
        given = of_row(vocabulary, itemsize, copied=copied, capped=False)
        block, held, depth = given["BLOCK"], given["HELD"], given["DEPTH"]
        assert block % given["WIDE"] == 0
        assert block > vocabulary or block % LINE == 0  # whole blocks lie before the tails
        again = vocabulary // block - held
        assert again == 0 if depth == 0 else (again > 0 and again % depth == 0), vocabulary
        assert held >= 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [7, 1000, 8191, 30522, 32768, 50257, 70000, 128256])
@pytest.mark.parametrize("outer", [1.0, -0.5])
def test_every_element_on_the_gpu(dtype: torch.dtype, vocabulary: int, outer: float) -> None:
    """Each is within half a unit in its last place, and a little, of float64's; targets too."""
    torch.manual_seed(0)
    logits = torch.randn(300, -(-vocabulary // 64) * 64, device="cuda").to(dtype)
    target = torch.randint(0, vocabulary, (300,), device="cuda")
    target[::7] = -100
    wide = logits.double()
    losses = torch.empty(300, device="cuda")
    exact, theirs = torch.empty_like(wide), losses.double()
    given = wide[:, :vocabulary], target, theirs, exact
    reference_rows(Piece(*given), Rows(), Setting(outer=outer))
    launch_rows(Piece(logits[:, :vocabulary], target, losses, logits), Rows(), Setting(outer=outer))
    half = torch.finfo(dtype).eps / 2
    subnormal = 4e-8 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(losses.double(), theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), exact, rtol=half + 4e-6, atol=subnormal)
