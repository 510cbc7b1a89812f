"""Layers of one input: their products in one launch, the gradients of the input in one sum; from
capture to call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iocompiler import engines
from iocompiler.compilation import Compilation
from iocompiler.cost_model.device import DEVICES
from iocompiler.ops import target
from iocompiler.plan.data import AtenStep, MatmulStep
from tests.accuracy import assert_as_accurate_as_eager, relative_error
from tests.compiling import compiler
from tests.runtime.text_engine import TextEngine

WIDTH, NARROW = 128, 64


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As for one of one SM, on which launches take so long that the fewest are fastest."""
    row = replace(DEVICES["h200"], sm_count=1, launch_s=1e-3)
    monkeypatch.setattr(engines, "device_row", lambda gm, options: row)
    with target.planned_for((9, 0)):
        yield


class Layers(nn.Module):
    """Three of one input that needs a gradient, of different widths."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.query = nn.Linear(WIDTH, WIDTH, bias)
        self.key, self.value = (nn.Linear(WIDTH, NARROW, bias) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        q, k, v = self.query(x), self.key(x), self.value(x)
        mixed = q.unflatten(-1, (-1, NARROW)) * k.softmax(-1)[..., None, :] * v[..., None, :]
        return x + F.layer_norm(mixed.flatten(-2), (WIDTH,))


def made(bias: bool) -> Layers:
    torch.manual_seed(0)
    return Layers(bias)


def steps(records: list[Compilation], name: str) -> list[MatmulStep]:
    (record,) = records
    return [s for s in record.plans[name].steps if isinstance(s, MatmulStep)]


@pytest.mark.parametrize("bias", [False, True])
def test_a_training_step(bias: bool) -> None:
    records: list[Compilation] = []
    draws = [{"x": torch.randn(2, 64, WIDTH)} for _ in range(3)]
    assert_as_accurate_as_eager(lambda: made(bias), draws, compiler(records), dtype=torch.bfloat16)
    assert [len(s.parts) for s in steps(records, "forward")] == [3]
    backward = steps(records, "backward")
    assert sorted(len(s.product.depths) for s in backward) == [1, 3], "of the input, in one sum"
    assert sorted(len(s.parts) for s in backward) == [1, 3], "of the weights, in one launch"
    assert not [s for s in records[0].plans["backward"].steps if isinstance(s, AtenStep)]
    found = [r for r in records[0].rewrites if r.pattern == "sum_of_products"]
    assert [(r.where.split(":")[0], r.variant) for r in found] == [
        ("test_products_of_one_input.py", "3 products")
    ]


def test_rows_that_are_a_symbol() -> None:
    records: list[Compilation] = []
    model = made(True).bfloat16()
    run = compiler(records, dynamic=True)(model)
    exact = made(True).double()
    exact.load_state_dict({name: p.double() for name, p in model.state_dict().items()})
    for rows in (64, 67, 130):
        x = torch.randn(2, rows, WIDTH).bfloat16()
        ours, theirs, wanted = (f(x.to(t)) for f, t in ((run, x.dtype), (model, x.dtype),
                                                         (exact, torch.float64)))  # fmt: skip
        assert relative_error(ours, wanted) <= 2 * relative_error(theirs, wanted) + 1e-5
        pairs = (
            torch.autograd.grad(y.double().square().sum(), list(m.parameters()))
            for y, m in ((ours, model), (theirs, model), (wanted, exact))
        )
        for got, eager, true in zip(*pairs, strict=True):
            assert relative_error(got, true) <= 3 * relative_error(eager, true) + 1e-5
    assert len(records) == 1
    assert [len(s.parts) for s in steps(records, "forward")] == [3]
    assert 3 in [len(s.product.depths) for s in steps(records, "backward")]


def test_a_module_found_in_the_cache() -> None:
    """Its kernels are those of the text: the pointers are handed over as the plan has it."""
    x = torch.randn(2, 64, WIDTH).bfloat16()
    results = []
    for what in ("stored", "found"):
        records: list[Compilation] = []
        model = made(True).bfloat16()
        result = compiler(records, engine=TextEngine())(model)(x)
        result.float().sum().backward()
        assert [r.cache for r in records] == [what]
        results.append([result.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
