"""What is folded into a product's step and what is not; folded plans compute what they did."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.cost_model.device import DEVICES
from iocompiler.plan.contents import made, references
from iocompiler.plan.data import AtenStep, KernelStep, MatmulStep, Plan, ViewStep
from iocompiler.plan.fold import folded
from iocompiler.plan.moving import names_read, written
from iocompiler.plan.peak import scheduled_peak
from iocompiler.plan.priced import chosen_by_price, priced
from iocompiler.plan.product import MatmulTile
from iocompiler.plan.sites import Declined, sites, survey
from tests.codegen.matmuls import Folded, plan_on_fakes, tf32
from tests.plan.graphs import Planned, relative_error

TILE = MatmulTile(128, 128, 64, num_warps=8, num_stages=3)
H200 = DEVICES["h200"]


def rand(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def gelu_by_hand(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return 0.5 * y * (1 + torch.tanh(0.79788456 * (y + 0.044715 * y**3)))


def dropped(x: Tensor, w: Tensor, u: Tensor) -> Tensor:
    return torch.where(u > 0.1, (x @ w) / 0.9, 0.0)


def by_position(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    return (x @ w).view(2, 8, 3, 4).transpose(1, 2) * c


def halves_gated(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    value, gate = F.linear(x, w.t(), b).chunk(2, -1)
    return value * F.gelu(gate)


X, W, B = (2, 8, 6), (6, 12), (12,)
TAKEN: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "bias": (lambda x, w, b: x @ w + b, (X, W, B)),
    "linear and GELU": (lambda x, w, b: F.gelu(F.linear(x, w.t(), b)), (X, W, B)),
    "GELU by hand": (gelu_by_hand, (X, W)),
    "residual": (lambda x, w, r: r + x @ w, (X, W, (2, 8, 12))),
    "residual, bias and scale": (lambda x, w, b, r: r + 0.1 * (x @ w + b), (X, W, B, (2, 8, 12))),
    "dropout": (dropped, (X, W, (2, 8, 12))),
    "mask by row": (lambda x, w, m: (x @ w).masked_fill(m > 0, -1e4), (X, W, (2, 8, 1))),
    "cast": (lambda x, w: (x @ w).double().to(torch.float16), (X, W)),
    "heads": (lambda x, w: ((x @ w).view(2, 8, 3, 4).transpose(1, 2) * 2).contiguous(), (X, W)),
    "by position": (by_position, (X, W, (8, 4))),
    "transposed result": (lambda x, w: F.silu(x @ w).transpose(1, 2).contiguous(), (X, W)),
    "scores": (lambda q, k, b: q @ k.transpose(1, 2) * 0.3 + b, ((3, 5, 6), (3, 7, 6), (5, 7))),
    "addmm of a matrix": (lambda c, x, w: torch.addmm(c, x, w).relu(), ((8, 12), (8, 6), W)),
    "gated": (lambda x, w, v: F.silu(x @ w) * (x @ v), (X, W, W)),
    "gated, GELU": (lambda x, w, v: (x @ v) * F.gelu(x @ w, approximate="tanh"), (X, W, W)),
    "halves": (halves_gated, (X, W)),
    "halves of a linear layer": (lambda x, w, b: halves_gated(x, w, b), (X, W, B)),
    "two results": (lambda x, w: ((x @ w).sigmoid(), (x @ w).tanh()), (X, W)),
}


DIFFERENTIATED = ("linear and GELU", "residual", "heads", "gated", "halves of a linear layer")


@pytest.mark.parametrize(
    ("name", "grad"), [(n, False) for n in TAKEN] + [(n, True) for n in DIFFERENTIATED]
)
def test_taken(name: str, grad: bool) -> None:
    """With gradients, the product may be saved for the backward."""
    f, shapes = TAKEN[name]
    compiled = Folded(TILE)
    inputs = [rand(*shape, grad=grad) for shape in shapes]
    runs = [_run(run, inputs, wide) for run, wide in ((compiled(f), False), (f, False), (f, True))]
    assert any(isinstance(step, MatmulStep) for step in compiled.plans[0].steps), name
    for got, theirs, wanted in zip(*runs, strict=True):
        assert got.dtype == theirs.dtype
        assert relative_error(got, wanted) <= 3 * relative_error(theirs, wanted) + 1e-5


def _run(f: Callable[..., Any], inputs: list[Tensor], wide: bool) -> list[Tensor]:
    given = [x.detach().double() if wide else x.detach().clone() for x in inputs]
    leaves = [x.requires_grad_(old.requires_grad) for x, old in zip(given, inputs, strict=True)]
    out = f(*given)
    results = list(out) if isinstance(out, tuple) else [out]
    wanted = [x for x in leaves if x.requires_grad]
    if not wanted:
        return results
    total = sum(
        (r.to(x.dtype) * r.shape[-1]).square().sum()
        for r, x in zip(results, given * 2, strict=False)
    )
    return [*results, *torch.autograd.grad(total, wanted, allow_unused=True)]


def test_halves_of_one_product_are_two_of_one_operand() -> None:
    compiled = Folded(TILE)
    x, w, b = rand(16, 6), rand(12, 6), rand(12)
    with torch.no_grad():
        result = compiled(lambda x, w, b: halves_gated(x, w.t(), b))(x, w, b)
    torch.testing.assert_close(result, halves_gated(x, w.t(), b))
    (step,) = compiled.steps
    assert step.product.n == 6
    assert step.product.starts == (0, 6 * 6)
    assert step.args[1] == step.args[2], "both are the one weight"
    assert step.product.elements_read == (16 * 6, 6 * 6, 6 * 6)


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w: (y := x @ w)[:, :4] * y[:, 4:8],  # a part of it
        lambda x, w: (y := x @ w)[:, :6] * y[:, 5:11],  # overlapping
        lambda x, w: (y := x @ w)[:, :6] * y[:, 6:] + y.sum(),  # summed, too
        lambda x, w: (y := x @ w)[:8] * y[8:],  # halves of its rows
    ],
)
def test_what_are_no_halves(f: Callable[..., Tensor]) -> None:
    planned = Planned()
    with torch.no_grad():
        planned(f)(rand(16, 6), rand(6, 12))
    assert not sites(planned.plans[0])


def test_the_gradient_of_an_activation() -> None:
    """dx = (g @ w.t()) * gelu'(y) is one step; the backward of a gate has two results."""
    x, w, v = rand(16, 6, grad=True), rand(6, 12, grad=True), rand(12, 5, grad=True)
    compiled = Folded(TILE)
    (compiled(lambda x, w, v: F.gelu(x @ w) @ v)(x, w, v)).sum().backward()
    assert len([s for s in compiled.plans[1].steps if isinstance(s, MatmulStep)]) == 1
    compiled = Folded(TILE)
    u = rand(6, 12, grad=True)
    compiled(lambda x, w, u, v: (F.silu(x @ w) * (x @ u)) @ v)(x, w, u, v).sum().backward()
    steps = [s for s in compiled.plans[1].steps if isinstance(s, MatmulStep)]
    assert max(len([b for b in s.tensors if b.role == "out"]) for s in steps) == 2


def _softmaxed(x: Tensor, w: Tensor) -> Tensor:
    return torch.softmax(x @ w, -1)


def _summed_twice(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ w
    return (y * 2).sum(0), y + 1


def _halves(x: Tensor, w: Tensor) -> Tensor:
    a, b = (x @ w).chunk(2, -1)
    return torch.cat([-b, a], -1)


def _part(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w)[:, :5].sin()


def _outer(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    return (x @ w)[:, None, :] * c[None, :, None]


def _read_before(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return F.silu(y) + torch.sort(y, -1)[0]


def _overwrites(x: Tensor, w: Tensor) -> Tensor:
    x.copy_(x @ w)
    return x * 1.0


def _flipped(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).flip(1).sin()


def _gathered(x: Tensor, w: Tensor, at: Tensor) -> Tensor:
    return (x @ w)[at].sin()


SQUARE = ((12, 12), (12, 12))
DECLINED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "a reduction of rows": (_softmaxed, SQUARE, ""),
    "parts of the product": (_halves, SQUARE, "under a condition"),
    "a slice": (_part, SQUARE, "computes more, or less|rows and columns|rows are not"),
    "broadcast the other way": (_outer, (*SQUARE, (3,)), "computes more, or less"),
    "another call reads it before": (_read_before, SQUARE, "reads the product before"),
    "what it is made of is overwritten": (_overwrites, SQUARE, "overwrites what the product"),
    "reversed": (_flipped, SQUARE, "a part of it"),
    "picked rows": (_gathered, (*SQUARE, torch.tensor([3, 1, 2])), "computed places"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    f, given, reason = DECLINED[name]
    inputs = [x if isinstance(x, Tensor) else rand(*x) for x in given]
    planned = Planned()
    with torch.no_grad():
        planned(f)(*inputs)
    (plan,) = planned.plans
    assert not sites(plan)
    found = [each for each in survey(plan) if isinstance(each, Declined)]
    if reason:
        assert any(re.search(reason, each.reason) for each in found), found
    assert folded(plan, {}) == plan


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64], ids=str)
def test_dtypes_the_template_does_not_sum(dtype: torch.dtype) -> None:
    planned = Planned()
    x = torch.ones(8, 8, dtype=dtype)
    planned(lambda x, w: x @ w + w)(x, x)
    assert not list(survey(planned.plans[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_library_rounds_to_tf32_is_left_to_it(dtype: torch.dtype) -> None:
    def f(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return F.silu(x @ w) * (x @ v)

    for allowed in (False, True):
        with tf32(allowed):
            plan = plan_on_fakes(f, (8, 6), (6, 12), (6, 12), dtype=dtype)
            (found,) = survey(plan)
        if allowed and dtype == torch.float32:
            assert isinstance(found, Declined)
            assert "rounds operands" in found.reason
        else:
            assert not isinstance(found, Declined)


def test_scaled_sums_are_left_to_the_library() -> None:
    planned = Planned()
    planned(lambda c, x, w: torch.addmm(c, x, w, alpha=2.0).sin())(
        rand(8, 8), rand(8, 8), rand(8, 8)
    )
    assert not sites(planned.plans[0])


def test_long_epilogues_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iocompiler.plan.sites._MOST_OPERATIONS", 5)
    planned = Planned()
    planned(gelu_by_hand)(rand(8, 8), rand(8, 8))
    (found,) = survey(planned.plans[0])
    assert isinstance(found, Declined)
    assert "operations on 2 tensors" in found.reason


def test_autocast_is_seen_as_it_is_spelled_out() -> None:
    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.gelu(F.linear(x, w, b))

    compiled = Folded(TILE)
    given = rand(16, 8), rand(12, 8), rand(12)
    result = compiled(f)(*given)
    (step,) = compiled.steps
    assert step.product.dtype == result.dtype == torch.bfloat16
    exact = F.gelu(F.linear(*(x.double() for x in given)))
    assert relative_error(result, exact) <= 2 * relative_error(f(*given), exact) + 1e-5


def test_sizes_that_are_symbols() -> None:
    compiled = Folded(TILE)
    run = compiled(lambda x, w, b: F.silu(F.linear(x, w, b)), dynamic=True)
    for rows in (5, 9):
        x, w, b = rand(2, rows, 7), rand(11, 7), rand(11)
        torch.testing.assert_close(run(x, w, b), F.silu(F.linear(x, w, b)))
    assert len(compiled.steps) == 1
    assert compiled.steps[0].size_symbols


def test_an_empty_sum_is_zero() -> None:
    compiled = Folded(TILE)
    x, w, r = rand(5, 0), rand(0, 7), rand(5, 7)
    torch.testing.assert_close(compiled(lambda x, w, r: x @ w + r)(x, w, r), r)
    assert len(compiled.steps) == 1


def test_a_product_that_is_read_later_is_stored() -> None:
    def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w
        return y.sin(), y.t()

    compiled = Folded(TILE)
    x, w = rand(8, 6), rand(6, 12)
    for got, wanted in zip(compiled(f)(x, w), f(x, w), strict=True):
        torch.testing.assert_close(got, wanted)
    assert len(compiled.steps[0].outputs) == 2


def test_what_is_rounded_stays_rounded() -> None:
    """The backward sees what the forward computed with."""
    x, w = rand(64, 64, dtype=torch.bfloat16), rand(64, 64, dtype=torch.bfloat16)
    compiled = Folded(TILE)
    y, z = compiled(lambda x, w: ((y := x @ w) * 1.0, y.sin()))(x, w)
    assert torch.equal(z, y.sin())


# --- plans


def layers(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    for _ in range(3):
        x = x + F.gelu(F.linear(x, w, b)) @ v
    return x


@pytest.fixture
def deep() -> Plan:
    shapes = ((4096, 512), (2048, 512), (2048,), (2048, 512))
    return plan_on_fakes(layers, *shapes, dtype=torch.bfloat16)


def test_equal_sites_are_one_choice(deep: Plan) -> None:
    found = sites(deep)
    assert len(found) == 6
    assert len({site.key for site in found}) == len({site.name for site in found}) == 2
    one = folded(deep, {found[0].key: TILE})
    assert sum(isinstance(step, MatmulStep) for step in one.steps) == 3
    assert sum(isinstance(step, KernelStep) for step in one.steps) == 3
    both = folded(deep, {site.key: TILE for site in found})
    assert [type(step) for step in both.steps if not isinstance(step, ViewStep)] == [MatmulStep] * 6


def test_what_is_folded_is_no_longer_unfused(deep: Plan) -> None:
    plan = folded(deep, {site.key: TILE for site in sites(deep)})
    products = {name for s in deep.steps if isinstance(s, AtenStep) for name in made(s)}
    assert [e for e in deep.unfused if e.producer in products]
    assert not [e for e in plan.unfused if e.producer in products]


def test_rows_may_be_a_symbol_where_operands_are_copied() -> None:
    compiled = Folded(TILE)
    x, w, b = rand(24, 16), rand(32, 16), rand(32)
    torch._dynamo.mark_dynamic(x, 0)
    compiled(lambda x, w, b: F.silu(F.linear(x, w, b)), dynamic=None)(x, w, b)
    (step,) = compiled.steps
    assert not isinstance(step.product.m, int)
    assert step.product.takes_descriptors
    assert not replace(step.product, aligned=False).takes_descriptors
    assert not replace(step.product, batch=2).takes_descriptors


@pytest.mark.parametrize("start", [0, 3, 8])
def test_where_operands_start_is_known(start: int) -> None:
    compiled = Folded(TILE)
    compiled(lambda x, w: F.silu(x[:, start:] @ w))(rand(24, 16 + start), rand(16, 32))
    (step,) = compiled.steps
    assert step.product.aligned == (start * 4 % 16 == 0)


def test_nothing_is_read_before_it_is_made(deep: Plan) -> None:
    plan = folded(deep, {site.key: TILE for site in sites(deep)})
    there = {name for name, _ in plan.inputs}
    for step in plan.steps:
        assert names_read(step) <= there
        assert not written(step)
        there |= set(made(step))
    assert {r.name for r in references(plan.outputs)} <= there


def test_less_is_held_at_once(deep: Plan) -> None:
    plan = folded(deep, {site.key: TILE for site in sites(deep)})
    nothing = replace(deep, inputs=(), steps=(), outputs=())
    before, after = (scheduled_peak(p, nothing, {}, {}) for p in (deep, plan))
    assert after < before


def test_only_what_was_measured_is_folded_by_price(deep: Plan) -> None:
    unknown, slow = (replace(H200, matmul_template=share) for share in (None, 0.2))
    assert not priced(deep, unknown, {})
    found = priced(deep, H200, {})
    chosen = {each.site.key: each.tile for each in found if each.pays}
    assert set(chosen) == {site.key for site in sites(deep)}
    assert all(tile.m >= 64 for tile in chosen.values())
    assert chosen_by_price(deep, found) == folded(deep, chosen)
    dear = priced(deep, slow, {})
    assert not any(each.pays for each in dear)
    plan = chosen_by_price(deep, dear)
    assert plan.steps == deep.steps
    reasons = {edge.reason for edge in plan.unfused}
    assert {each.reason for each in dear} <= reasons
    assert all(re.search(r"us, in one \d+\.\d us: modeled", each.reason) for each in dear)


def test_unaligned_operands_are_not_folded_by_price() -> None:
    plan = plan_on_fakes(
        lambda x, w, b: F.gelu(F.linear(x, w, b)), (4096, 501), (2048, 501), (2048,),
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert sites(plan)
    (each,) = priced(plan, H200, {})
    assert each.folded_s is None
    assert not each.pays
    assert chosen_by_price(plan, [each]) == plan


def test_two_products_of_different_operands_are_not_one() -> None:
    plan = plan_on_fakes(
        lambda x, w, y, v: x @ w + y @ v, (64, 32), (32, 48), (64, 96), (96, 48),
        dtype=torch.float16,
    )  # fmt: skip
    (site,) = sites(plan)
    assert len(site.step.product.rights) == 1
    assert site.step.product.k == 96, "that with the longer sums"
    assert sum(isinstance(s, AtenStep) for s in folded(plan, {site.key: TILE}).steps) == 1
