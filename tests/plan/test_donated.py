"""What a forward leaves to its backward alone, and the plans that write over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import iocompiler as ioc
from iocompiler.compilation import Compilation
from iocompiler.graph.view import results
from iocompiler.plan import inplace
from iocompiler.plan.data import AtenStep, KernelStep, Plan, Ref, TensorSpec, ViewStep
from iocompiler.plan.donated import donated
from iocompiler.plan.inplace import in_place
from iocompiler.plan.moving import names_read
from iocompiler.plan.peak import scheduled_peak, taken
from tests.compiling import compiled


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace, "LEAST_BYTES", 0)


def trained(f: Callable[..., Any], *inputs: Tensor) -> Compilation:
    torch._dynamo.reset()
    run, records = compiled(f, ioc.DEFAULT, engine="reference", cache=False)
    found = run(*inputs)
    (found[0] if isinstance(found, tuple) else found).sum().backward()
    (record,) = records
    return record


def handed_over(record: Compilation) -> dict[str, int]:
    return taken(record.flat["backward"], results(record.flat["forward"]))


def own(record: Compilation) -> set[str]:
    return set(donated(record.plans["forward"], handed_over(record)))


def over(plan: Plan) -> list[tuple[str, str]]:
    return [pair for s in plan.steps if isinstance(s, KernelStep) for pair in s.over]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def two_layers(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return (F.gelu(x @ w) @ v).square()


def test_intermediates_are_and_inputs_are_not() -> None:
    record = trained(two_layers, leaf(6, 8), leaf(8, 8), leaf(8, 4))
    assert own(record)
    assert not {name for name in own(record) if name.startswith("primals")}
    assert set(handed_over(record)) > own(record)
    assert {source for _, source in over(record.plans["backward"])} <= own(record)
    assert over(record.plans["backward"])


def test_the_users_are_not() -> None:
    def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = (x @ w).exp()
        return y * 2, y.t()

    record = trained(both, leaf(4, 4), leaf(4, 4))
    assert not own(record)


SPEC = TensorSpec((4, 4), (4, 1), torch.float32, "cpu")
HALF = TensorSpec((2, 4), (4, 1), torch.float32, "cpu")


def forward(*outputs: str, call: str = "aten.mm.default") -> Plan:
    """Two views of what a call makes, and one of an input."""
    made = AtenStep(call, (Ref("x"), Ref("x")), (), (("y", SPEC),), False)
    views = [ViewStep("top", "y", HALF), ViewStep("rest", "y", HALF, 8), ViewStep("z", "x", HALF)]
    return Plan((("x", SPEC),), (made, *views), tuple(map(Ref, outputs)), "cpu")


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        (("y",), {"y"}),
        (("top",), {"top"}),
        (("top", "rest"), set()),
        (("y", "y"), set()),
        (("z", "y"), {"y"}),
        (("x",), set()),
    ],
)
def test_storages(outputs: tuple[str, ...], found: set[str]) -> None:
    given = {name: at for at, name in enumerate(outputs)}
    assert donated(forward(*outputs), given) == found


def test_calls_whose_results_may_be_anybodys() -> None:
    assert not donated(forward("y", call="aten.special_op.default"), {"y": 0})


def test_what_is_read_again_is_left_alone() -> None:
    def twice(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        return y.square() @ y  # the product reads y again

    record = trained(twice, leaf(4, 4), leaf(4, 4))
    plan = record.plans["backward"]
    last = {name: at for at, step in enumerate(plan.steps) for name in names_read(step)}
    for at, step in enumerate(plan.steps):
        for _, source in step.over if isinstance(step, KernelStep) else ():
            assert last[source] == at


def test_small_tensors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace, "LEAST_BYTES", 1 << 24)
    record = trained(two_layers, leaf(6, 8), leaf(8, 8), leaf(8, 4))
    assert not over(record.plans["backward"])


def test_results_are_not_kept_twice_in_the_peak() -> None:
    record = trained(lambda x, w: (x @ w).square(), leaf(32, 4), leaf(4, 32))
    forward, backward = record.plans["forward"], record.plans["backward"]
    steps = [replace(s, over=()) if isinstance(s, KernelStep) else s for s in backward.steps]
    plain = replace(backward, steps=tuple(steps))
    given = handed_over(record)
    less = scheduled_peak(forward, plain, given, {}) - scheduled_peak(forward, backward, given, {})
    assert less == 32 * 32 * 4


def test_what_is_returned_is_left_alone() -> None:
    record = trained(two_layers, leaf(6, 8), leaf(8, 8), leaf(8, 4))
    plan, mine = record.plans["backward"], own(record)
    (_, source), *_ = over(in_place(plan, mine))
    returning = replace(plan, outputs=(*plan.outputs, Ref(source)))
    assert source not in [taken for _, taken in over(in_place(returning, mine))]
