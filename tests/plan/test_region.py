"""Functions that operators call, as regions of a plan; results that are no plain tuple."""

from __future__ import annotations

from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._subclasses.fake_tensor import FakeTensorMode

import iocompiler as ioc
from iocompiler.codegen.module import emit_module
from iocompiler.cost_model.device import DEVICES
from iocompiler.errors import CannotPlan
from iocompiler.plan.build import build_plan
from iocompiler.plan.contents import all_steps
from iocompiler.plan.data import AtenStep, KernelStep, Plan

aten = torch.ops.aten


def _graph(calls: Any) -> tuple[fx.GraphModule, FakeTensorMode]:
    """``calls(graph, x, call)`` builds a graph of one input of 8 x 8 floats."""
    mode = FakeTensorMode()
    graph, root = fx.Graph(), torch.nn.Module()
    x = graph.placeholder("x")
    with mode:
        x.meta["val"] = torch.empty(8, 8)

    def call(target: Any, args: tuple[Any, ...], value: Any, **kwargs: Any) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        return node

    with mode:
        graph.output([calls(graph, x, call)])
    return fx.GraphModule(root, graph), mode


def _plan(gm: fx.GraphModule) -> Plan:
    return build_plan(gm, DEVICES["h200"], "graph")


def test_a_kernel_of_the_users_returns_a_dict() -> None:
    def calls(graph: fx.Graph, x: fx.Node, call: Any) -> fx.Node:
        y = call(aten.exp.default, (x,), torch.empty(8, 8))
        made = call(
            triton_kernel_wrapper_functional, (), {"out": torch.empty(8, 8)}, kernel_idx=0,
            constant_args_idx=0, grid=[(1, 1, 1)], tma_descriptor_metadata={},
            kwargs={"x": y, "out": x}, tensors_to_clone=["out"],
        )  # fmt: skip
        item = call(getitem, (made, "out"), _empty())
        return call(aten.sin.default, (item,), torch.empty(8, 8))

    gm, _ = _graph(calls)
    plan = _plan(gm)
    assert [type(step) for step in plan.steps] == [KernelStep, AtenStep, KernelStep]
    text = emit_module(plan, "graph")
    assert 'kwargs={"x": exp_default, "out": x}, tensors_to_clone=("out",))["out"]' in text


def _empty() -> Tensor:
    return torch.empty(8, 8)


def test_results_inside_of_results() -> None:
    plans: list[Plan] = []

    def engine(plan: Plan, gm: fx.GraphModule) -> Any:
        plans.append(plan)
        return lambda args: fx.Interpreter(gm).boxed_run(args)

    from tests.test_higher_order import nested_results

    run = torch.compile(nested_results, backend=ioc.Compiler(engine=engine, strict=True))
    run(torch.randn(8, 16), torch.randn(8, 16))
    (step,) = (s for s in plans[0].steps if isinstance(s, AtenStep))
    assert step.paths == ((0,), (1, 0), (1, 1))
    assert "results[1][0]" in emit_module(plans[0], "graph")


def test_a_call_whose_result_is_not_known_has_no_plan() -> None:
    def calls(graph: fx.Graph, x: fx.Node, call: Any) -> fx.Node:
        made = call(triton_kernel_wrapper_functional, (), None, kernel_idx=0)
        made.meta.clear()
        item = call(getitem, (made, "out"), _empty())
        return call(aten.sin.default, (item,), torch.empty(8, 8))

    gm, _ = _graph(calls)
    with pytest.raises((CannotPlan, AssertionError)):
        _plan(gm)


def test_explain_plans_regions_for_the_device_asked_for() -> None:
    def f(x: Tensor) -> Tensor:
        (y,) = torch.cond(x.sum() > 0, lambda a: (a.sin().exp(),), lambda a: (a.cos(),), (x,))
        return y.softmax(-1)

    report = ioc.explain(f, torch.randn(8, 16), device="h200", training=False)
    kernels = [kernel.name for kernel in report.kernels]
    assert "higher_order.cond" in kernels


def test_all_steps_go_through_regions() -> None:
    plans: list[Plan] = []

    def engine(plan: Plan, gm: fx.GraphModule) -> Any:
        plans.append(plan)
        return lambda args: fx.Interpreter(gm).boxed_run(args)

    def f(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda a: a.sin().exp(), lambda a: a.cos(), (x,))

    torch.compile(f, backend=ioc.Compiler(engine=engine, strict=True))(torch.randn(8, 16))
    nodes = [n for s in all_steps(plans[0]) if isinstance(s, KernelStep) for n in s.nodes]
    assert {"exp", "cos"} <= set(nodes)
