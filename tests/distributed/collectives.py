"""Functional collectives in a graph: results as eager's, in the order of the graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from iocompiler.compilation import Compilation
from iocompiler.plan.data import AtenStep, KernelStep, Plan
from tests.accuracy import Results, compare
from tests.distributed.training import backend


def reductions(x: Tensor, w: Tensor) -> Tensor:
    first = collectives.all_reduce((x * 2).exp() + w, "sum", dist.group.WORLD)
    second = collectives.all_reduce(x.sin() * w, "max", dist.group.WORLD)
    return (first * 3).softmax(-1) + second.tanh()


def gathered(x: Tensor, w: Tensor) -> Tensor:
    whole = collectives.all_gather_tensor((x * w).exp(), 0, dist.group.WORLD)
    part = collectives.reduce_scatter_tensor(whole.sin() + 1, "sum", 0, dist.group.WORLD)
    return part.softmax(-1) + whole.sum(0)


def independent(x: Tensor, w: Tensor) -> Tensor:
    """Collectives that do not read one another."""
    a = (x * 2).exp()
    r1 = collectives.all_reduce(a, "sum", dist.group.WORLD)
    r2 = collectives.all_reduce(w.sum(0), "sum", dist.group.WORLD)
    r3 = collectives.all_gather_tensor(w[:1], 0, dist.group.WORLD)
    return (a + r1).softmax(-1) + r2 * r3.sum(0)


def in_place(x: Tensor, w: Tensor) -> Tensor:
    """What a collective has read is overwritten after it."""
    whole = collectives.wait_tensor(collectives.all_gather_tensor(x, 0, dist.group.WORLD))
    w.copy_(x * 5)
    x.add_(1)
    return whole.softmax(-1)


def overlapped(x: Tensor, w: Tensor) -> Tensor:
    """What a collective reads is read for the last time by another while that is under way: a
    result written over it would be sent in its place.
    """
    ops, group = torch.ops._c10d_functional, dist.group.WORLD.group_name
    rows = x @ w.t()
    sent = ops.all_gather_into_tensor(rows, dist.get_world_size(), group)
    other = (rows * 0.5).sin() @ w
    whole = ops.wait_tensor(sent)
    return whole.softmax(-1) @ w + other.repeat(dist.get_world_size(), 1)


def plain_c10d(x: Tensor, w: Tensor) -> Tensor:
    y = (x * 2).exp()
    dist.all_reduce(y)
    return (y * w).softmax(-1)


GRAPHS = (reductions, gathered, independent, in_place, overlapped, plain_c10d)
SHAPE = {"cpu": (4, 6), "cuda": (2048, 1024)}  # on a GPU so large that a collective takes a while


def collectives_in_a_graph(device: torch.device) -> None:
    for function in GRAPHS:
        torch._dynamo.reset()
        records: list[Compilation] = []
        run = torch.compile(function, backend=backend(records, device), fullgraph=True)
        inputs = _inputs(device)
        _judge(
            function.__name__, *(_called(f, inputs, d) for f, d in (
                (run, torch.float32), (function, torch.float32), (function, torch.float64),
            )),
        )  # fmt: skip
        (record,) = records
        _in_order(record, function.__name__)


def _inputs(device: torch.device) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1 + dist.get_rank())
    return [torch.randn(SHAPE[device.type], generator=draw).to(device) / 2 for _ in range(2)]


def _called(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> Results:
    """The result, and the inputs as they are afterwards."""
    x, w = (t.to(dtype, copy=True) for t in inputs)
    return Results({"out": function(x, w), "x": x, "w": w}, {})


def _judge(name: str, ours: Results, eager: Results, reference: Results) -> None:
    bad = [str(c) for c in compare(ours, eager, reference, torch.float32) if not c.ok]
    assert not bad, f"{name}: {bad}"


def _in_order(record: Compilation, name: str) -> None:
    """Collectives stand in the plan as often, and in the order, as in the graph; kernels around."""
    plan = record.plans["inference"]
    targets = [str(n.target) for n in record.flat["inference"].graph.nodes]
    assert _collectives(plan) == [t for t in targets if _is_collective(t)], name
    assert any(isinstance(step, KernelStep) for step in plan.steps), name


def _is_collective(target: str) -> bool:
    return target.startswith("_c10d_functional.") and "wait" not in target


def _collectives(plan: Plan) -> list[str]:
    called = [step.target for step in plan.steps if isinstance(step, AtenStep)]
    return [target for target in called if _is_collective(target)]


def gradients_through_collectives(device: torch.device) -> None:
    from torch.distributed import _functional_collectives as collectives

    def loss(x: Tensor, w: Tensor) -> Tensor:
        group = dist.group.WORLD
        of_all = collectives.all_gather_tensor_autograd((x * w).exp(), 0, group)
        mine = collectives.reduce_scatter_tensor_autograd(of_all * 2, "sum", 0, group)
        return mine.softmax(-1).square().sum()

    def differentiated(function: Callable[..., Tensor], dtype: torch.dtype) -> Results:
        given = [t.to(dtype, copy=True).requires_grad_() for t in _inputs(device)]
        found = torch.autograd.grad(function(*given), given)
        return Results({}, dict(zip("xw", found, strict=True)))

    ours = differentiated(torch.compile(loss, backend=backend([], device)), torch.float32)
    _judge("", ours, *(differentiated(loss, d) for d in (torch.float32, torch.float64)))
