"""Flat graphs for planner tests, and their plans run on the CPU by the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule

from iocompiler.cost_model.device import DEVICES
from iocompiler.ops.decompositions import table
from iocompiler.plan.build import build_plan
from iocompiler.plan.data import KernelStep, Plan
from iocompiler.runtime.reference import run_plan

H200 = DEVICES["h200"]


class Planned:
    """Plans every graph of a function and runs it by the reference; keeps graphs and plans."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.graphs: list[GraphModule] = []

    def __call__(self, fn: Callable[..., Any], dynamic: bool | None = False) -> Callable[..., Any]:
        backend = aot_autograd(
            fw_compiler=self._compile,
            bw_compiler=self._compile,
            inference_compiler=self._compile,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=table(),
            keep_inference_input_mutations=True,
        )
        torch._dynamo.reset()
        return torch.compile(fn, backend=backend, dynamic=dynamic)

    def _compile(self, gm: GraphModule, inputs: Any) -> Any:
        plan = build_plan(gm, H200, f"graph{len(self.plans)}")
        self.plans.append(plan)
        self.graphs.append(gm)
        return make_boxed_func(lambda *args: run_plan(plan, list(args)))

    @property
    def kernels(self) -> list[KernelStep]:
        return [s for plan in self.plans for s in plan.steps if isinstance(s, KernelStep)]


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference; equal NaN and inf do not differ."""
    a, b = value.detach().double().flatten(), reference.detach().double().flatten()
    if a.shape != b.shape:
        raise AssertionError(f"shape {tuple(value.shape)} instead of {tuple(reference.shape)}")
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, a - b)
    scale = torch.where(b.isfinite(), b, 0.0).norm().clamp_min(1e-12)
    return float(difference.norm() / scale)
