"""Calls keep the order of the graph where it means something: collectives, random numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed  # registers the operators
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from iocompiler.cost_model.device import DEVICES
from iocompiler.plan import build
from iocompiler.plan.data import AtenStep, KernelStep, Plan

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


def planned(function: Callable[..., object], *shapes: tuple[int, ...]) -> Plan:
    with FakeTensorMode() as mode:
        inputs = [torch.empty(shape) for shape in shapes]
    gm = make_fx(function)(*inputs)
    assert mode is not None
    return build.build_plan(gm, DEVICES["h200"], "graph")


def names(plan: Plan) -> list[str]:
    return [s.target if isinstance(s, AtenStep) else s.name for s in plan.steps]


def reduced(x: Tensor) -> Tensor:
    return c10d.wait_tensor.default(c10d.all_reduce.default(x, "sum", "0"))


LARGE = (1 << 12, 1 << 10)


def two(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    first = c10d.all_reduce.default(x * 2, "sum", "0")
    second = c10d.all_reduce.default(w, "max", "0")
    # shares its input with what the first one reads, and so its kernel
    return x * 3, c10d.wait_tensor.default(first), c10d.wait_tensor.default(second)


def test_a_fusion_delays_no_collective_behind_a_later_one() -> None:
    plan = planned(two, LARGE, (8,))
    kernels = [step for step in plan.steps if isinstance(step, KernelStep)]
    assert [step.nodes for step in kernels] == [("mul", "mul_1")]
    calls = [s for s in plan.steps if isinstance(s, AtenStep)]
    assert [s.args[1] for s in calls if "all_reduce" in s.target] == ["sum", "max"]


def test_random_operators_draw_in_order() -> None:
    def f(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        first = aten.bernoulli.default(x * 0.5)
        second = aten.rand_like.default(w)
        return x * 3, first, second

    calls = [n for n in names(planned(f, LARGE, (8,))) if n.startswith("aten")]
    assert calls == ["aten.bernoulli.default", "aten.rand_like.default"]


def test_no_kernel_joins_what_a_collective_keeps_apart() -> None:
    def f(x: Tensor) -> Tensor:
        return reduced(x * 2) * 3

    plan = planned(f, LARGE)
    kinds = ["kernel" if isinstance(s, KernelStep) else s.target for s in plan.steps]
    assert kinds == [
        "kernel", "_c10d_functional.all_reduce.default", "_c10d_functional.wait_tensor.default",
        "kernel",
    ]  # fmt: skip


@pytest.mark.parametrize("through_a_view", [False, True])
def test_what_is_gathered_is_overwritten_once_it_is_read(through_a_view: bool) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        source = x.view(-1) if through_a_view else x
        whole = c10d.all_gather_into_tensor.default(source, 2, "0")
        new = x + 1
        done = c10d.wait_tensor.default(whole)
        x.copy_(new)
        return done * 2

    found = names(planned(f, LARGE, (8,)))
    written = next(i for i, n in enumerate(found) if "copy" in n)
    assert found.index("_c10d_functional.wait_tensor.default") < written
