"""Models whose products are steps of the matmul template, chosen by price: from capture to call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iocompiler import engines
from iocompiler.compilation import Compilation
from iocompiler.cost_model.device import DEVICES
from iocompiler.plan.data import MatmulStep
from tests.accuracy import assert_as_accurate_as_eager
from tests.compiling import compiler
from tests.runtime.text_engine import TextEngine


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which small products are worth folding: one SM, and launches take long."""
    row = replace(DEVICES["h200"], sm_count=1, launch_s=1e-4)
    monkeypatch.setattr(engines, "device_row", lambda gm, options: row)


class Block(nn.Module):
    """GELU and residual, gate and residual, a scale by row."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.gate, self.value = (nn.Linear(64, 72, bias=False) for _ in range(2))
        self.out = nn.Linear(72, 64, bias=False)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(x)))
        x = F.rms_norm(x, (64,))
        return x + self.out(F.silu(self.gate(x)) * self.value(x)) * scale


def made() -> Block:
    torch.manual_seed(0)
    return Block()


def folded_steps(records: list[Compilation], name: str) -> list[MatmulStep]:
    return [s for r in records for s in r.plans[name].steps if isinstance(s, MatmulStep)]


def test_a_training_step() -> None:
    records: list[Compilation] = []
    draws = [{"x": torch.randn(2, 40, 64), "scale": torch.randn(2, 40, 1)} for _ in range(3)]
    assert_as_accurate_as_eager(made, draws, compiler(records), dtype=torch.bfloat16)
    assert len(folded_steps(records, "forward")) >= 2
    assert any(len(s.product.rights) == 2 for s in folded_steps(records, "forward"))
    assert folded_steps(records, "backward")


def test_rows_that_are_a_symbol() -> None:
    records: list[Compilation] = []
    run = compiler(records, dynamic=True)(made().bfloat16())
    for rows in (40, 67):
        x, scale = torch.randn(2, rows, 64).bfloat16(), torch.randn(2, rows, 1).bfloat16()
        with torch.no_grad():
            torch.testing.assert_close(
                run(x, scale), made().bfloat16()(x, scale), rtol=3e-2, atol=3e-2
            )
    assert len(records) == 1
    assert folded_steps(records, "inference")


def test_a_module_found_in_the_cache() -> None:
    """Its kernels are those of the text: the pointers are handed over as the plan has it."""
    x, scale = torch.randn(2, 40, 64).bfloat16(), torch.randn(2, 40, 1).bfloat16()
    results = []
    for what in ("stored", "found"):
        records: list[Compilation] = []
        model = made().bfloat16()
        result = compiler(records, engine=TextEngine())(model)(x, scale)
        result.float().sum().backward()
        assert [r.cache for r in records] == [what]
        results.append([result.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
