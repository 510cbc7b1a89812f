"""Products that a tensor, a bias or both are added to: which the library adds, and what must be
declined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.cost_model.device import DEVICES
from iocompiler.plan.data import AtenStep, KernelStep, Ref, Step, TensorSpec, ViewStep
from iocompiler.plan.priced import priced
from iocompiler.tile.index import Affine, Axis
from iocompiler.tile.program import Builder
from tests.accuracy import assert_near_exact
from tests.codegen.matmuls import plan_on_fakes
from tests.plan.adding import BF16, Added, tensors, with_residuals
from tests.plan.graphs import Planned
from tests.runtime.plans import binary, kernel, on_a_gpu, plan, spec

X, W, R, B = (3, 5, 8), (8, 8), (3, 5, 8), (8,)


TAKEN: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "a product and a tensor": (lambda x, w, r: x @ w + r, (X, W, R)),
    "the other way round": (lambda x, w, r: r + x @ w, (X, W, R)),
    "matrices": (lambda x, w, r: torch.mm(x, w).add(r), ((5, 8), (8, 8), (5, 8))),
    "batches": (lambda x, w, r: torch.bmm(x, w) + r, (X, (3, 8, 8), R)),
    "a right matrix by columns": (lambda x, w, r: x @ w.t() + r, (X, W, R)),
    "its own input": (lambda x, w: x + x @ w, (X, W)),
    "what a call made": (lambda x, w: (s := x.sort().values) @ w + s, (X, W)),
    "the first part of another": (lambda x, w, r: x @ w + r[0], (X[1:], W, R)),
    "two products": (lambda x, w, v: x @ w + x @ v, (X, W, W)),
    "one behind the other": (lambda x, w, r: (x @ w + r) @ w + r, (X, W, R)),
    "in another shape": (lambda x, w, r: (x @ w + r).view(5, 3, 8), (X, W, R)),
    "a row": (lambda x, w, b: x @ w + b, (X, W, B)),
    "a row for each of a batch": (lambda x, w, b: b + torch.bmm(x, w), (X, (3, 8, 8), B)),
    "a row by the library and a tensor": (lambda x, w, b, r: F.linear(x, w, b) + r, (X, W, B, R)),
    "its bias first": (lambda x, w, b, r: r + torch.addmm(b, x, w), ((5, 8), W, B, (5, 8))),
    "a row and a tensor": (lambda x, w, b, r: x @ w + b + r, (X, W, B, R)),
    "a tensor and a row": (lambda x, w, b, r: (r + x @ w) + b, (X, W, B, R)),
    "of one row": (lambda x, w, b, r: F.linear(x, w, b) + r, ((1, 8), W, B, (1, 8))),
    "the first row of another": (lambda x, w, b, r: x @ w + b[0] + r, (X, W, (2, 8), R)),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    f, shapes = TAKEN[name]
    given, planned = tensors(*shapes), Added()
    with torch.no_grad():
        found = planned(f)(*given)
    assert not planned.kernels
    assert set(planned.calls) & {"addmm", "baddbmm", "biased_addmm"}
    eager, exact = f(*given), f(*(x.double() for x in given))
    assert_near_exact([found], [eager], [exact], BF16)


DECLINED: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "another dtype": (lambda x, w, r: x @ w + r.float(), (X, W, R)),
    "a wider result": (lambda x, w, r: (x @ w).float() + r.float(), (X, W, R)),
    "every second of a row": (lambda x, w, b: x @ w + b[::2], (X, W, (16,))),
    "a row that fits another way": (lambda x, w, r: x @ w + r, ((3, 5, 8), (8, 5), (5, 1))),
    "two rows": (lambda x, w, b, c: x @ w + b + c, (X, W, B, B)),
    "a row twice": (lambda x, w, b: x @ w + b + b, (X, W, B)),
    "a row and the library's": (lambda x, w, b, c: F.linear(x, w, b) + c, (X, W, B, B)),
    "two tensors": (lambda x, w, r, s: x @ w + r + s, (X, W, R, R)),
    "two tensors and a row": (lambda x, w, b, r, s: F.linear(x, w, b) + r + s, (X, W, B, R, R)),
    "a matrix by the library": (lambda x, w, r, s: torch.addmm(r, x, w) + s,
                                ((5, 8), W, (5, 8), (5, 8))),
    "a row and a tensor to each of a batch": (lambda x, w, b, r: torch.bmm(x, w) + b + r,
                                              (X, (3, 8, 8), B, R)),
    "a column": (lambda x, w, r: x @ w + r, (X, W, (3, 5, 1))),
    "a matrix for all": (lambda x, w, r: torch.bmm(x, w) + r, (X, (3, 8, 8), (5, 8))),
    "a number": (lambda x, w: x @ w + 1.0, (X, W)),
    "a factor": (lambda x, w, r: torch.add(x @ w, r, alpha=2), (X, W, R)),
    "a difference": (lambda x, w, r: x @ w - r, (X, W, R)),
    "a product of the two": (lambda x, w, r: (x @ w) * r, (X, W, R)),
    "more than the sum": (lambda x, w, r: (x @ w + r).relu(), (X, W, R)),
    "twice itself": (lambda x, w: (y := x @ w) + y, (X, W)),
    "the product is returned": (lambda x, w, r: ((y := x @ w), y + r), (X, W, R)),
    "the product is read again": (lambda x, w, r: ((y := x @ w) + r, y @ w), (X, W, R)),
    "of columns": (lambda x, w, r: x @ w + r.t(), ((5, 8), W, (8, 5))),
    "a part of the product": (lambda x, w, r: (x @ w)[:3] + r, ((5, 8), W, (3, 8))),
    "turned": (lambda x, w, r: (x @ w).t() + r, ((8, 8), W, (8, 8))),
    "a part from within": (lambda x, w, r: x @ w + r[1], (X[1:], W, R)),
    "every second row": (lambda x, w, r: x @ w + r[::2], ((5, 8), W, (10, 8))),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    f, shapes = DECLINED[name]
    given, planned = tensors(*shapes), Added()
    kept = [x.clone() for x in given]
    with torch.no_grad():
        found = planned(f)(*given)
    (before,), (plan,) = planned.before, planned.plans
    assert any(isinstance(step, KernelStep) for step in plan.steps)
    assert with_residuals(before) == before
    torch.testing.assert_close(found, f(*kept), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_are_atens(dtype: torch.dtype) -> None:
    planned = Added()
    with torch.no_grad():
        planned(lambda x, w, r: x @ w + r)(*tensors(X, W, R, dtype=dtype))
    assert planned.calls == []
    assert with_residuals(planned.before[0]) == planned.before[0]


@pytest.mark.parametrize("between", [False, True])
def test_what_is_added_is_overwritten(between: bool) -> None:
    """Before the sum: it would be added as it was. Behind it, it may be."""
    square = spec(8, 8, dtype=BF16)
    builder, x = Builder(), Affine.of("x")
    loads = [builder.cast(builder.load(name, x, BF16), torch.float32) for name in "ab"]
    builder.store("out", x, builder.cast(builder.map("add", *loads), BF16))
    program = builder.program((Axis("x", 64),), (), binary("add", 64, BF16).buffers)
    total = kernel("add", program, ("y", "r", "z"), square)
    written = AtenStep("aten.copy_.default", (Ref("r"), Ref("w")), (), ((None, None),), False)
    mm = AtenStep("aten.mm.default", (Ref("x"), Ref("w")), (), (("y", square),), False)
    steps: list[Step] = [mm, written, total] if between else [mm, total, written]
    inputs: dict[str, TensorSpec | None] = dict.fromkeys(("x", "w", "r"), square)
    before = on_a_gpu(plan(inputs, steps, (Ref("z"),)))
    assert (with_residuals(before) == before) == between


def test_what_is_made_later_is_not_added_before() -> None:
    """What is added must be there when the product is made; another product's place would do."""
    planned = Added()
    with torch.no_grad():
        planned(lambda x, w, v: x @ w + x.sin() @ v)(*tensors(X, W, W))
    assert sorted(planned.calls) == ["addmm", "mm"]


def test_a_plan_for_the_cpu_stays_as_it_is() -> None:
    planned = Planned()
    with torch.no_grad():
        planned(lambda x, w, r: x @ w + r)(*tensors(X, W, R))
    assert with_residuals(planned.plans[0]) == planned.plans[0]


def test_sizes_that_are_not_known() -> None:
    planned = Added()
    x, w, r = tensors(X, W, R)
    for tensor in (x, r):
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(tensor, dim)
    with torch.no_grad():
        found = planned(lambda x, w, r: x @ w + r, dynamic=None)(x, w, r)
    assert planned.calls == ["addmm"]
    exact = x.double() @ w.double() + r.double()
    assert_near_exact([found], [x @ w + r], [exact], BF16)


def test_gradients() -> None:
    """The gradient of what a branch and a residual read."""
    planned = Added()

    def f(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return x + (x @ w).relu() @ v

    def step(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor | None]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors(X, W, W)]
        out = function(*leaves)
        out.float().square().sum().backward()
        return [out, *(x.grad for x in leaves)]

    found = step(planned(f), BF16)
    assert_near_exact(found, step(f, BF16), step(f, torch.float64), BF16)
    assert planned.calls.count("addmm") >= 2


def test_edges_are_gone_and_bytes_are_less() -> None:
    before = on_a_gpu(plan_on_fakes(lambda x, w, r: x @ w + r, X, W, R, dtype=BF16))
    after = with_residuals(before)
    assert any(edge.producer == "mm" for edge in before.unfused)
    assert not any(edge.producer == "mm" for edge in after.unfused)
    (call,) = (step for step in after.steps if isinstance(step, AtenStep))
    assert call.target == "aten.addmm.default"
    assert call.reason == "contraction: cuBLAS"
    assert {step.name for step in after.steps if isinstance(step, ViewStep)} >= {"add"}


def test_the_template_is_held_against_the_library_with_what_it_adds() -> None:
    """Not against a kernel that would not run."""
    shapes: Mapping[str, tuple[int, ...]] = {"x": (512, 256), "w": (256, 256), "r": (512, 256)}
    there = on_a_gpu(plan_on_fakes(lambda x, w, r: x @ w + r, *shapes.values(), dtype=BF16))
    (ours,) = priced(there, DEVICES["h100"], {})
    (apart,) = priced(replace(there, device="cpu"), DEVICES["h100"], {})
    assert ours.kernel_s == 0.0 < apart.kernel_s
    assert ours.library_s < apart.library_s + apart.kernel_s
