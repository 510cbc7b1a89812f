"""The models as a GPU would run them, on the CPU: what the library is asked to do beside products
(residuals, biases, a GELU) is as accurate as eager, in bfloat16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from iocompiler import Compiler
from iocompiler.codegen.module import emit_module
from iocompiler.cost_model.device import DEVICES
from iocompiler.plan import build, folds, inplace, memory
from iocompiler.plan.activation import with_activations
from iocompiler.plan.addressed import addressed
from iocompiler.plan.build import size_hints
from iocompiler.plan.data import AtenStep, Plan
from iocompiler.plan.residual import with_residuals
from iocompiler.runtime.load import load_text
from tests.accuracy import assert_as_accurate_as_eager
from tests.models.zoo import CASES, TINY
from tests.runtime.plans import interpreter, on_a_gpu

# a GELU beside its product, whatever it takes: the models here are small
H100 = replace(DEVICES["h100"], gelu_beside_product=1e-6)
IN_PLACE, SHARED = inplace.in_place, memory.shared_memory


class OnAGpu:
    """An engine that settles plans as for a GPU, and runs their text on the CPU; ``made`` counts
    the library's calls.
    """

    def __init__(self) -> None:
        self.made: Counter[str] = Counter()

    def __call__(self, graph: Plan, gm: GraphModule) -> Callable[[list[Any]], list[Any]]:
        hints = size_hints(gm)
        plan = with_residuals(on_a_gpu(graph), H100, hints)
        plan = with_activations(plan, H100, hints)
        plan = SHARED(addressed(IN_PLACE(plan)), hints)
        calls = [step for step in plan.steps if isinstance(step, AtenStep) and step.product]
        self.made += Counter(step.target.split(".")[1] for step in calls)
        return load_text(emit_module(plan, "graph"), "graph", "cpu", interpreter(plan))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> OnAGpu:
    """Plans come to it as the planner leaves them, for one kernel at a time."""
    monkeypatch.setattr(inplace, "in_place", lambda plan, donated=(): plan)
    monkeypatch.setattr(memory, "shared_memory", lambda plan, hints, donated=(): plan)
    monkeypatch.setattr(build, "batch", lambda steps, *_: steps)
    monkeypatch.setattr(folds, "batch_folds", lambda steps, *_: steps)
    return OnAGpu()


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("gpt2-eager", {"addmm_gelu": 2, "biased_addmm": 4}),
        ("llama-eager", {"addmm": 4}),
        ("vit-eager", {"biased_addmm": 3}),
        ("bert-sdpa", {"biased_addmm": 4}),
        *(
            pytest.param(name, {}, marks=pytest.mark.slow)
            for name in ("t5-eager", "encoder-layer", "residual-block", "cell-loop", "mlp")
        ),
    ],
)
@pytest.mark.parametrize("train", [True, False], ids=["train", "forward"])
def test_is_as_accurate_as_eager(
    name: str, made: dict[str, int], train: bool, engine: OnAGpu
) -> None:
    backend = Compiler(engine=engine, strict=True, cache=False)
    torch._dynamo.reset()
    assert_as_accurate_as_eager(
        lambda: CASES[name].module(TINY),
        CASES[name].draws(torch.bfloat16, TINY),
        lambda module: torch.compile(module, backend=backend),
        dtype=torch.bfloat16,
        train=train,
    )
    if train:
        assert {target: engine.made[target] for target in made} == made
