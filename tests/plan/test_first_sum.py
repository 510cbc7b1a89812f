"""Kernels that begin with the sum of a product and a tensor, and do more: what of them the library
does, and what must be declined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.cost_model.device import DEVICES
from iocompiler.cost_model.kernel import kernel_seconds
from iocompiler.cost_model.schedule import choose
from iocompiler.plan.data import AtenStep, KernelStep, Plan
from iocompiler.plan.priced import priced
from iocompiler.tile.traffic import traffic
from tests.accuracy import assert_near_exact
from tests.codegen.matmuls import plan_on_fakes
from tests.plan.adding import BF16, Added, tensors, with_residuals
from tests.runtime.plans import on_a_gpu

X, W, R, B = (3, 5, 8), (8, 8), (3, 5, 8), (8,)
ROWS = (1 << 18, 256)
H100 = DEVICES["h100"]

F_ = Callable[..., Any]


def norm(h: Tensor) -> Tensor:
    return F.layer_norm(h, (h.shape[-1],))


def rms(h: Tensor) -> Tensor:
    wide = h.float() if h.dtype == BF16 else h
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(h.dtype)


TAKEN: dict[str, tuple[F_, tuple[tuple[int, ...], ...]]] = {
    "a layer norm": (lambda x, w, r: (h := x @ w + r, norm(h)), (X, W, R)),
    "an rms norm": (lambda x, w, r: (h := r + x @ w, rms(h)), (X, W, R)),
    "its own input": (lambda x, w: (h := x + x @ w, norm(h)), (X, W)),
    "an activation": (lambda x, w, r: (h := x @ w + r, h.sigmoid()), (X, W, R)),
    "an activation of a row's sum": (lambda x, w, b: (h := x @ w + b, h.sigmoid()), (X, W, B)),
    "a row and a tensor": (lambda x, w, b, r: (h := F.linear(x, w, b) + r, norm(h)), (X, W, B, R)),
    "a row in the kernel": (lambda x, w, b, r: (h := x @ w + b + r, norm(h)), (X, W, B, R)),
    "sums of columns": (lambda x, w, r: (h := x @ w + r, h.sum(0)), ((64, 8), W, (64, 8))),
    "a norm's and sums of columns": (
        lambda x, w, r: (h := x @ w + r, norm(h), h.float().sum((0, 1))), (X, W, R)),
    "columns": (lambda x, w, r: (h := x @ w + r, h.t().contiguous()), ((8, 8), W, (8, 8))),
    "sums of rows": (lambda x, w, r: (h := x @ w + r, h.float().sum(-1)), (X, W, R)),
    "batches": (lambda x, w, r: (h := torch.bmm(x, w) + r, norm(h)), (X, (3, 8, 8), R)),
    "in another shape": (lambda x, w, r: (h := (x @ w + r).view(15, 8), norm(h)), (X, W, R)),
    "another sum behind it": (lambda x, w, r, s: (h := x @ w + r, h + s), (X, W, R, R)),
    "a row for it and behind it": (lambda x, w, b: (h := x @ w + b, h * b), (X, W, B)),
    "two, one behind the other": (
        lambda x, w, r: (h := x @ w + r, g := norm(h) @ w + h, norm(g)), (X, W, R)),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    """The kernel that is left reads the sum alone; it moves a load and a store less."""
    f, shapes = TAKEN[name]
    given, planned = tensors(*shapes), Added()
    with torch.no_grad():
        found = planned(f)(*given)
    (before,), (after,) = planned.before, planned.plans
    assert set(planned.calls) & {"addmm", "baddbmm", "biased_addmm"}
    assert "mm" not in planned.calls
    assert "bmm" not in planned.calls
    assert kernels(after)
    assert len(kernels(after)) == len(kernels(before))
    assert sum(map(moved, kernels(after))) < sum(map(moved, kernels(before)))
    eager, exact = f(*given), f(*(x.double() for x in given))
    assert_near_exact(list(found), list(eager), list(exact), BF16)


def kernels(of: Plan) -> list[KernelStep]:
    return [step for step in of.steps if isinstance(step, KernelStep)]


def moved(step: KernelStep) -> int:
    found = traffic(step.program)
    return int(found.read_bytes) + int(found.written_bytes)


DECLINED: dict[str, tuple[F_, tuple[tuple[int, ...], ...]]] = {
    "the sum is not stored": (lambda x, w, r: norm(x @ w + r), (X, W, R)),
    "stored in another dtype": (lambda x, w, r: (h := (x @ w + r).float(), norm(h)), (X, W, R)),
    "read before it is rounded": (
        lambda x, w, r: ((h := (x @ w).float() + r.float()).to(BF16), h.exp().to(BF16)), (X, W, R)),
    "the product is read again": (
        lambda x, w, r: (h := (y := x @ w) + r, norm(h), y.exp()), (X, W, R)),
    "the product is masked": (lambda x, w, r, m: (h := (x @ w) * m + r, norm(h)), (X, W, R, R)),
    "what is added is read again": (
        lambda x, w, r: (h := x @ w + r, norm(h) * r), (X, W, R)),
    "what is added is made there": (
        lambda x, w, r: (h := x @ w + r.exp(), norm(h)), (X, W, R)),
    "a factor": (lambda x, w, r: (h := torch.add(x @ w, r, alpha=2), norm(h)), (X, W, R)),
    "a scaled product": (lambda x, w, r: (h := torch.add(r, x @ w, alpha=2), norm(h)), (X, W, R)),
    "a difference": (lambda x, w, r: (h := x @ w - r, norm(h)), (X, W, R)),
    "another dtype": (lambda x, w, r: (h := (x @ w + r.half()).to(BF16), norm(h)), (X, W, R)),
    "a column": (lambda x, w, r: (h := x @ w + r, norm(h)), (X, W, (3, 5, 1))),
    "two tensors": (lambda x, w, r, s: (h := x @ w + r + s, norm(h)), (X, W, R, R)),
    "twice itself": (lambda x, w: (h := (y := x @ w) + y, norm(h)), (X, W)),
    "turned": (lambda x, w, r: (h := (x @ w).t() + r, norm(h)), ((8, 8), W, (8, 8))),
    "turned behind the sum": (
        lambda x, w, r: (h := ((x @ w) + r).t().contiguous(), norm(h)), ((8, 8), W, (8, 8))),
    "of columns": (lambda x, w, r: (h := x @ w + r.t(), norm(h)), ((8, 8), W, (8, 8))),
    "a part of the product": (lambda x, w, r: (h := (x @ w)[:3] + r, norm(h)),
                              ((5, 8), W, (3, 8))),
    "a part of it only": (lambda x, w, r: (h := F.pad(x @ w, (0, 0, 1, 0)) + r, norm(h)),
                          ((4, 8), W, (5, 8))),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    f, shapes = DECLINED[name]
    given, planned = tensors(*shapes), Added()
    with torch.no_grad():
        found = planned(f)(*(x.clone() for x in given))
    (before,) = planned.before
    assert kernels(before)
    assert with_residuals(before) == before
    torch.testing.assert_close(found, f(*given), rtol=2e-2, atol=2e-2)


# --- schedules and prices


def test_the_schedule_is_the_models_or_the_measured_one() -> None:
    before = on_a_gpu(plan_on_fakes(lambda x, w, r: ((h := x @ w + r).sum(0), h),
                                    ROWS, (256, 256), ROWS, dtype=BF16))  # fmt: skip
    first = next(step for step in kernels(before) if len(step.args) > 3)
    assert with_residuals(before) != before
    after = kernels(with_residuals(before))[0]
    model = choose(after.program, H100, {})
    assert after.schedule == replace(model, programs=first.schedule.programs)
    assert model != choose(first.program, H100, {})  # one load at once for two
    measured = replace(first, schedule=replace(first.schedule, num_warps=16))
    steps = tuple(measured if step is first else step for step in before.steps)
    assert kernels(with_residuals(replace(before, steps=steps)))[0].schedule == measured.schedule


def test_prices_are_of_what_runs() -> None:
    """The template is held against the library's sum and the rest of the kernel."""
    shapes = ((2048, 1024), (1024, 1024), (2048, 1024))
    there = on_a_gpu(
        plan_on_fakes(lambda x, w, r: ((h := x @ w + r), h.sigmoid()), *shapes, dtype=BF16)
    )
    (ours,) = priced(there, H100, {})
    (apart,) = priced(replace(there, device="cpu"), H100, {})
    (rest,) = kernels(with_residuals(there))
    assert ours.kernel_s == kernel_seconds(rest.program, H100, {}) < apart.kernel_s
    assert ours.library_s >= apart.library_s
    assert ours.library_s + ours.kernel_s < apart.library_s + apart.kernel_s


@pytest.mark.parametrize("biased", [False, True])
def test_edges_are_those_that_pass_through_memory(biased: bool) -> None:
    def f(x: Tensor, w: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        h = x @ w + b + r if biased else x @ w + r
        return h, norm(h)

    before = on_a_gpu(plan_on_fakes(f, X, W, R, B, dtype=BF16))
    after = with_residuals(before)
    assert any(edge.producer == "mm" for edge in before.unfused)
    assert not any(edge.producer == "mm" for edge in after.unfused)
    total = "add_1" if biased else "add"
    (edge,) = (edge for edge in after.unfused if edge.producer == total)
    assert f"{total} comes from a call" in edge.reason
    (step,) = kernels(after)
    assert not {"add", total} & set(step.nodes)
    assert edge.consumer == step.nodes[0]


# --- whole programs


def block(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A layer with the norm first, and the one behind it."""
    h = x + F.linear(norm(x).relu(), w, b)
    return h, h + rms(h) @ v


@pytest.mark.parametrize("dynamic", [False, True])
def test_training(dynamic: bool) -> None:
    planned = Added()

    def step(function: F_, dtype: torch.dtype) -> list[Tensor | None]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors(X, W, B, W)]
        if dynamic:
            for dim in (0, 1):
                torch._dynamo.mark_dynamic(leaves[0], dim)
        out = function(*leaves)
        sum(part.float().square().sum() for part in out).backward()
        return [*out, *(x.grad for x in leaves)]

    found = step(planned(block, dynamic=None), BF16)
    assert_near_exact(found, step(block, BF16), step(block, torch.float64), BF16)
    forward = planned.plans[0]
    calls = [s for s in forward.steps if isinstance(s, AtenStep) and s.product is not None]
    assert [call.target.split(".")[1] for call in calls] == ["biased_addmm", "addmm"]
    assert all(bool(s.product.size_symbols) == dynamic for s in calls if s.product is not None)
