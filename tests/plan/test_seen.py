"""Buffers are made in the shape that calls and the caller see."""

from __future__ import annotations

import pytest
import torch

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.plan.data import AtenStep, KernelStep, Plan, Ref, TensorSpec, ViewStep
from iocompiler.plan.seen import as_seen


def plan_of(function: object, *inputs: torch.Tensor, dynamic: bool = False) -> Plan:
    records: list[Compilation] = []
    torch._dynamo.reset()
    compiler = Compiler(engine="reference", strict=True, on_compiled=records.append)
    run = torch.compile(function, backend=compiler, dynamic=dynamic)  # type: ignore[call-overload]
    found, exact = run(*inputs), function(*inputs)  # type: ignore[operator]
    torch.testing.assert_close(found, exact)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.stride() == theirs.stride()
    (record,) = records
    return record.plans["inference"]


def views(plan: Plan) -> list[ViewStep]:
    return [step for step in plan.steps if isinstance(step, ViewStep)]


def rows(x, w):
    return (x.sin().reshape(-1, 8) @ w,)


def both_ways(x, w):
    y = x.sin().reshape(-1, 8)
    return y @ w, y.t() @ y


def returned(x, w):
    return (x.sum(0, keepdim=True).flatten(), w * 2)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("function", "left"), [(rows, 0), (both_ways, 1), (returned, 0)])
def test_a_whole_view_is_the_buffer(function: object, left: int, dynamic: bool) -> None:
    plan = plan_of(function, torch.randn(3, 4, 8), torch.randn(8, 5), dynamic=dynamic)
    made = [step.base for step in views(plan)]
    assert len(made) == left


def with_itself(x, w):
    y = x.sin()
    return y.reshape(-1, 8) @ w, y


def a_part(x, w):
    return (x.sin()[1:].reshape(-1, 8) @ w,)


def other_type(x, w):
    return (x.sin().view(torch.int32).view(torch.float32).reshape(-1, 8) @ w,)


def expanded_to_nothing(x, w):
    return (x.sin().mean((0, 1), keepdim=True).expand(0, 1, 8).reshape(-1, 8) @ w,)


@pytest.mark.parametrize("function", [with_itself, other_type, expanded_to_nothing])
def test_what_is_seen_otherwise_stays(function: object) -> None:
    assert views(plan_of(function, torch.randn(3, 4, 8), torch.randn(8, 5)))


def test_a_part_is_right() -> None:
    plan_of(a_part, torch.randn(3, 4, 8), torch.randn(8, 5))


def test_views_of_parts_and_arguments_inside_lists_follow() -> None:
    whole, part = TensorSpec((2, 6), (6, 1), torch.float32, "cpu"), (3, 2)
    flat = TensorSpec((12,), (1,), torch.float32, "cpu")
    cut = TensorSpec(part, (2, 1), torch.float32, "cpu")
    source = plan_of(lambda x: (x.sin(), x.cos()), torch.randn(2, 6))
    (kernel,) = (step for step in source.steps if isinstance(step, KernelStep))
    (made, _), (other, _) = kernel.outputs
    steps = [
        kernel,
        ViewStep("flat", made, flat),
        ViewStep("cut", made, cut, 6),
        AtenStep("aten.cat.default", ([Ref("flat"), Ref("flat")],), (), (("joined", None),), False),
    ]
    found, outputs = as_seen(steps, (Ref("joined"), Ref("cut"), Ref("flat"), Ref(other)))
    assert [type(step) for step in found] == [KernelStep, ViewStep, AtenStep]
    assert isinstance(found[0], KernelStep)
    assert found[0].outputs == ((made, flat), (other, whole))
    assert outputs == (Ref("joined"), Ref("cut"), Ref(made), Ref(other))
    joined = AtenStep("aten.cat.default", ([Ref(made), Ref(made)],), (), (("joined", None),), False)
    assert found[2] == joined
