"""Plans in which the library does more than its products, as they would be for a GPU, run on the
CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from iocompiler.codegen.module import emit_module
from iocompiler.cost_model.device import DEVICES
from iocompiler.plan import residual
from iocompiler.plan.addressed import addressed
from iocompiler.plan.build import size_hints
from iocompiler.plan.data import AtenStep, Plan
from iocompiler.plan.memory import shared_memory
from iocompiler.runtime.load import load_text
from iocompiler.runtime.reference import run_plan
from tests.plan.graphs import Planned
from tests.runtime.plans import interpreter, on_a_gpu

BF16 = torch.bfloat16


def with_residuals(plan: Plan, hints: Mapping[str, int] | None = None) -> Plan:
    return residual.with_residuals(plan, DEVICES["h100"], hints or {})


class OnLibrary(Planned):
    """Plans as for a GPU, as `by_library` makes them; their text is run on the CPU, and gives what
    the reference gives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: list[Plan] = []

    def by_library(self, plan: Plan, hints: Mapping[str, int]) -> Plan:
        raise NotImplementedError

    def _compile(self, gm: GraphModule, inputs: Any) -> Any:
        super()._compile(gm, inputs)
        before, hints = on_a_gpu(self.plans[-1]), size_hints(gm)
        plan = shared_memory(addressed(self.by_library(before, hints)), hints)
        self.before.append(before)
        self.plans[-1] = plan
        run = load_text(emit_module(plan, "graph"), "graph", "cpu", interpreter(plan))

        def call(args: list[Any]) -> list[Any]:
            kept = [x.clone() if isinstance(x, Tensor) else x for x in args]
            expected, found = run_plan(plan, kept), run(args)
            for ours, theirs in zip(found, expected, strict=True):
                if isinstance(theirs, Tensor):
                    torch.testing.assert_close(ours, theirs)
                    assert ours.stride() == theirs.stride()
            return found

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    @property
    def calls(self) -> list[str]:
        steps = [s for plan in self.plans for s in plan.steps if isinstance(s, AtenStep)]
        return [step.target.split(".")[1] for step in steps if step.product is not None]


class Added(OnLibrary):
    """With residuals by the library."""

    def by_library(self, plan: Plan, hints: Mapping[str, int]) -> Plan:
        return with_residuals(plan, hints)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = BF16) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in shapes]
