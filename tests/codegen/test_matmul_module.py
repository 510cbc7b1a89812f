"""Modules with steps of the matmul template: their ``call`` hands over the right pointers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from iocompiler.codegen.module import emit_module
from iocompiler.cost_model.device import DEVICES
from iocompiler.plan.fold import folded
from iocompiler.plan.sites import sites
from iocompiler.report.build import Part, build_report
from iocompiler.report.kernels import Kernels
from iocompiler.runtime.graphs import mutated_inputs
from iocompiler.runtime.load import load_text
from tests.codegen.matmuls import SMALL, Folded, plan_on_fakes
from tests.runtime.plans import interpreter


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape)


def two_results(x: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = x[:, 3:] @ w.t()
    return y.sin() + r, y


def gated(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.silu(x @ w) * (x @ v)


def overwriting(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    r.add_(x @ w)
    return r * 2.0


RUNS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "views": (two_results, (rand(9, 8), rand(7, 5), rand(9, 7))),
    "two products": (gated, (rand(9, 8), rand(8, 7), rand(8, 7))),
    "in place": (overwriting, (rand(9, 8), rand(8, 7), rand(9, 7))),
    "bias": (lambda x, w, b: torch.tanh(F.linear(x, w, b)), (rand(2, 9, 8), rand(7, 8), rand(7))),
}


class Loaded(Folded):
    """Runs each plan as the module that is emitted for it, kernels by the tile interpreter."""

    def _compile(self, gm: GraphModule, inputs: Any) -> Any:
        super()._compile(gm, inputs)
        plan = self.plans[-1]
        return load_text(emit_module(plan, "graph"), "graph", binder=interpreter(plan))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_call(name: str, dynamic: bool) -> None:
    f, given = RUNS[name]
    compiled = Loaded()
    ours, theirs = ([x.clone() for x in given] for _ in range(2))
    with torch.no_grad():
        results = compiled(f, dynamic=dynamic)(*ours)
    assert len(compiled.steps) == 1
    torch.testing.assert_close(results, f(*theirs))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_what_a_step_overwrites_is_known() -> None:
    f, given = RUNS["in place"]
    compiled = Folded()
    with torch.no_grad():
        compiled(f)(*[x.clone() for x in given])
    (plan,) = compiled.plans
    assert [plan.inputs[n][1].shape for n in mutated_inputs(plan)] == [(9, 7)]  # type: ignore[union-attr]


# --- the report


def block(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    return x + F.gelu(F.linear(x, w, b)) @ v


def test_the_report_counts_what_is_no_longer_moved() -> None:
    shapes = ((4096, 512), (2048, 512), (2048,), (2048, 512))
    plan = plan_on_fakes(block, *shapes, dtype=torch.bfloat16)
    device = DEVICES["h200"]
    whole = folded(plan, {site.key: SMALL for site in sites(plan)})
    kernels = Kernels([Part("inference", whole)], device, compile_kernels=False)
    before = build_report([Part("inference", plan)], device)
    after = build_report([Part("inference", whole)], device, kernels.describe)
    products = 2 * 4096 * (2048 + 512) * 2  # written and read again
    assert before.bytes_moved - after.bytes_moved == products
    assert after.bytes_bound == before.bytes_bound
    assert after.flops - before.flops == 4096 * 2048  # of the bias, which the library adds unasked
    assert after.time_us < before.time_us
    assert not kernels.lost
    for kernel in after.kernels:
        assert kernel.generated
        assert kernel.tile == "matmul 16 x 16 x 16, 4 warps, 2 stages"
        assert "def forward_" in kernel.source
        assert kernel.bytes == kernel.bound
