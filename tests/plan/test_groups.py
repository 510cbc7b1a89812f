"""Which products of one operand are made by one launch, and which are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import iocompiler.ops.registered  # noqa: F401
from iocompiler.cost_model.device import DEVICES
from iocompiler.plan.data import AtenStep, MatmulStep, Plan
from iocompiler.plan.fallbacks import check_fallbacks
from iocompiler.plan.fold import folded
from iocompiler.plan.groups import MOST
from iocompiler.plan.priced import chosen_by_price, priced
from iocompiler.plan.sites import Site, sites
from iocompiler.report.build import Part, build_report
from tests.codegen.matmuls import SMALL, Folded, plan_on_fakes, tf32
from tests.plan.graphs import Planned

H100 = DEVICES["h100"]
HALF = torch.bfloat16
Function = Callable[..., Any]


def layers(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return F.linear(x, q), F.linear(x, k), F.linear(x, v)


def gradients(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return q.t() @ x, k.t() @ x, v.t() @ x


def added(*pairs: Tensor) -> Tensor:
    summed: Tensor = torch.ops.iocompiler.sum_of_products(list(pairs[::2]), list(pairs[1::2]))
    return summed


def parts(plan: Plan) -> list[int]:
    """How many products each group has."""
    return [len(site.step.parts) for site in sites(plan) if not site.has_kernel]


def alone(site: Site) -> bool:
    return not site.has_kernel


X, W = (32, 16), (24, 16)
TAKEN: dict[str, tuple[Function, tuple[tuple[int, ...], ...], list[int]]] = {
    "layers": (layers, (X, W, (8, 16), (8, 16)), [3]),
    "gradients of weights": (gradients, (X, (32, 24), (32, 8), (32, 8)), [3]),
    "one with a bias": (
        lambda x, q, b, k: (F.linear(x, q, b), F.linear(x, k)), (X, W, (24,), W), [2],
    ),
    "of two inputs": (
        lambda x, y, q, k: (x @ q, y @ q.tanh(), x @ k, y @ k.tanh()),
        (X, X, (16, 24), (16, 24)), [2, 2],
    ),
    "more than a launch takes": (
        lambda x, *w: tuple(F.linear(x, each) for each in w), (X, *[W] * (MOST + 2)), [MOST, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    f, shapes, expected = TAKEN[name]
    assert parts(plan_on_fakes(f, *shapes, dtype=HALF)) == expected


def in_a_row(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The second is of the first."""
    return torch.sort(x @ q @ q)[0]


def read_between(x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    found = torch.sort(x @ q)[0]
    return found, x @ (k + found[:16])


def far_apart(x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """The weights' gradients of layers one after the other: operands would be held."""
    one, y = x @ q, k
    for _ in range(10):
        y = torch.sort(y, 0)[0]
    return one, x @ y


def batches(x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    return torch.bmm(x, q), torch.bmm(x, k)


SQUARE = ((16, 16),) * 3
DECLINED: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "one of the other": (in_a_row, SQUARE),
    "read before the last": (read_between, SQUARE),
    "far apart": (far_apart, SQUARE),
    "batches": (batches, ((2, 16, 16),) * 3),
    "other inner extents": (lambda x, q, k: (x[:, :8] @ q, x @ k), ((16, 16), (8, 16), (16, 16))),
    "no operand in common": (lambda x, q, k: (x @ q, k @ x), SQUARE),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    f, shapes = DECLINED[name]
    assert parts(plan_on_fakes(f, *shapes, dtype=HALF)) == []


def test_a_gate_and_its_value_are_one_step_with_the_kernel_behind_them() -> None:
    plan = plan_on_fakes(lambda x, w, v: F.silu(x @ w) * (x @ v), *SQUARE, dtype=HALF)
    (site,) = sites(plan)
    assert site.has_kernel
    assert len(site.step.parts) == 1


@pytest.mark.parametrize("f", [layers, added])
def test_not_in_tf32(f: Function) -> None:
    plan = plan_on_fakes(f, *((16, 16),) * 4, dtype=torch.float32)
    assert len(sites(plan)) == 1
    with tf32(True):
        assert not sites(plan)


def test_what_others_read_between_two_of_them() -> None:
    """A view of the first is made where the group is."""

    def f(x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        one, two = (x @ q).view(4, 8, -1), (x @ k).view(4, 8, -1)
        return one.transpose(1, 2).softmax(-1), two.sum(1)

    given = [torch.randn(32, 16), torch.randn(16, 24), torch.randn(16, 8)]
    compiled, planned = Folded(SMALL), Planned()
    with torch.no_grad():
        ours, theirs = compiled(f)(*given), planned(f)(*given)
    assert [len(step.parts) for step in compiled.steps] == [2]
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted)


# --- by price


def test_one_accumulator_pays_for_the_gradient_of_an_input() -> None:
    """BERT-large: a third of the launches, of the results and of the short inner extents."""
    shapes = ((4096, 1024), (1024, 1024)) * 3
    plan = plan_on_fakes(added, *shapes, dtype=HALF)
    (each,) = priced(plan, H100, {})
    assert each.pays
    assert each.kernel_s == 0
    chosen = chosen_by_price(plan, [each])
    assert [len(s.product.depths) for s in chosen.steps if isinstance(s, MatmulStep)] == [3]
    assert not [s for s in chosen.steps if isinstance(s, AtenStep)]


def test_a_group_pays_where_the_parts_leave_most_of_the_device_idle() -> None:
    few, many = (
        plan_on_fakes(layers, (rows, 1024), *[(1024, 1024)] * 3, dtype=HALF) for rows in (512, 4096)
    )
    (one,), (other,) = priced(few, H100, {}), priced(many, H100, {})
    assert one.pays
    assert not other.pays
    left = chosen_by_price(many, [other])
    reasons = {step.reason for step in left.steps if isinstance(step, AtenStep)}
    (reason,) = reasons
    assert reason.startswith("contraction: cuBLAS; library ")
    assert reason.endswith(" us: modeled")
    check_fallbacks(left, torch.fx.GraphModule({}, torch.fx.Graph()), 0)  # still a library's call


def test_a_launch_reads_what_its_products_share_once() -> None:
    plan = plan_on_fakes(layers, (4096, 1024), *[(1024, 1024)] * 3, dtype=HALF)
    (site,) = sites(plan)
    together = folded(plan, {site.key: SMALL})
    before, after = (build_report([Part("inference", p)], H100) for p in (plan, together))
    assert before.bytes_moved - after.bytes_moved == 2 * 2 * 4096 * 1024
    assert after.bytes_bound == before.bytes_bound
    assert after.flops == before.flops


def test_a_sum_moves_no_parts() -> None:
    plan = plan_on_fakes(added, *((4096, 1024), (1024, 1024)) * 2, dtype=HALF)
    (site,) = sites(plan)
    together = folded(plan, {site.key: SMALL})
    before, after = (build_report([Part("inference", p)], H100) for p in (plan, together))
    assert before.bytes_moved - after.bytes_moved == 2 * 2 * 4096 * 1024  # written, read
    assert after.flops == before.flops
