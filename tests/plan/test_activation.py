"""GELUs of products that somebody else reads too: which the library computes, and what must be
declined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import iocompiler as ioc
from iocompiler.cost_model.call import call_of_step
from iocompiler.cost_model.device import DEVICES
from iocompiler.cost_model.roofline import contraction_time
from iocompiler.cost_model.rules import price
from iocompiler.plan.activation import with_activations
from iocompiler.plan.contents import made
from iocompiler.plan.data import AtenStep, KernelStep, Plan, Ref, TensorSpec
from iocompiler.plan.priced import priced
from iocompiler.runtime.graphs import obstacle
from tests.accuracy import assert_near_exact
from tests.codegen.matmuls import plan_on_fakes
from tests.plan.adding import BF16, OnLibrary, tensors
from tests.runtime.plans import on_a_gpu

H100 = DEVICES["h100"]
X, W, C = (3, 5, 16), (24, 16), (24,)
Results = Tensor | tuple[Tensor, ...]


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def activated(plan: Plan) -> Plan:
    return with_activations(plan, H100, {})


class Activated(OnLibrary):
    """With such activations by the library, of an H100."""

    def by_library(self, plan: Plan, hints: Mapping[str, int]) -> Plan:
        return with_activations(plan, H100, hints)


def listed(results: Results) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


TAKEN: dict[str, tuple[Callable[..., Results], tuple[tuple[int, ...], ...]]] = {
    "both returned": (lambda x, w, c: (gelu(y := F.linear(x, w, c)), y), (X, W, C)),
    "a matrix": (lambda x, w, c: (gelu(y := F.linear(x, w, c)), y), ((5, 16), W, C)),
    "without a bias": (lambda x, w: (gelu(y := F.linear(x, w)), y), (X, W)),
    "by a matrix as it lies": (lambda x, w: (gelu(y := x @ w), y), (X, (16, 24))),
    "turned": (lambda x, w, c: (gelu((y := F.linear(x, w, c)).t()), y), ((24, 16), W, C)),
    "read by a product": (
        lambda x, w, c, v: (gelu(y := F.linear(x, w, c)) @ v, y),
        (X, W, C, (24, 8)),
    ),
    "the product is read by a call": (
        lambda x, w, c: (gelu(y := F.linear(x, w, c)), y.sort().values),
        (X, W, C),
    ),
    "the product is read by a product": (
        lambda x, w, c, v: (gelu(y := F.linear(x, w, c)), y @ v),
        (X, W, C, (24, 8)),
    ),
    "in another shape": (
        lambda x, w, c: (gelu(y := F.linear(x, w, c)).view(5, 3, 24), y),
        (X, W, C),
    ),
    "of another shape": (
        lambda x, w, c: (gelu((y := F.linear(x, w, c)).view(5, 3, 24)), y),
        (X, W, C),
    ),
    "one row": (lambda x, w, c: (gelu(y := F.linear(x, w, c)), y), ((1, 16), W, C)),
}


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str, dtype: torch.dtype) -> None:
    f, shapes = TAKEN[name]
    given, planned = tensors(*shapes, dtype=dtype), Activated()
    with torch.no_grad():
        found = planned(f)(*given)
    assert planned.calls.count("addmm_gelu") == 1
    eager, exact = f(*given), f(*(x.double() for x in given))
    assert_near_exact(listed(found), listed(eager), listed(exact), dtype)


DECLINED: dict[str, tuple[Callable[..., Results], tuple[tuple[int, ...], ...]]] = {
    "by erf": (lambda x, w, c: (F.gelu(y := F.linear(x, w, c)), y), (X, W, C)),
    "another activation": (lambda x, w, c: (F.silu(y := F.linear(x, w, c)), y), (X, W, C)),
    "nobody else reads the product": (lambda x, w, c: gelu(F.linear(x, w, c)), (X, W, C)),
    "a factor behind it": (lambda x, w, c: (gelu(y := F.linear(x, w, c)) * 2, y), (X, W, C)),
    "a gate": (lambda x, w, c, g: (gelu(y := F.linear(x, w, c)) * g, y), (X, W, C, (3, 5, 24))),
    "a factor before it": (lambda x, w, c: (gelu((y := F.linear(x, w, c)) * 2), y), (X, W, C)),
    "a wider result": (lambda x, w, c: (gelu((y := F.linear(x, w, c)).float()), y), (X, W, C)),
    "a sum beside it": (
        lambda x, w, c: ((z := gelu(y := F.linear(x, w, c))), y, z.float() + 1),
        (X, W, C),
    ),
    "a matrix added": (
        lambda x, w, c: (gelu(y := torch.addmm(c, x, w)), y),
        ((5, 16), (16, 24), (5, 24)),
    ),
    "a factor of the bias": (
        lambda x, w, c: (gelu(y := torch.addmm(c, x, w, beta=2)), y),
        ((5, 16), (16, 24), C),
    ),
    "odd columns": (
        lambda x, w, c: (gelu(y := F.linear(x, w, c)), y),
        (X, (20, 16), (20,)),
    ),
    "odd sums": (lambda x, w, c: (gelu(y := F.linear(x, w, c)), y), ((5, 12), (24, 12), C)),
    "batches": (lambda x, w: (gelu(y := torch.bmm(x, w)), y), (X, (3, 16, 24))),
    "a part of the product": (lambda x, w, c: (gelu((y := F.linear(x, w, c))[1:]), y), (X, W, C)),
    "no product": (lambda x: (gelu(y := x.sin()), y), (X,)),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    f, shapes = DECLINED[name]
    given, planned = tensors(*shapes), Activated()
    with torch.no_grad():
        found = planned(f)(*given)
    (before,) = planned.before
    assert any(isinstance(step, KernelStep) for step in before.steps)
    assert activated(before) == before
    torch.testing.assert_close(listed(found), listed(f(*given)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_are_atens(dtype: torch.dtype) -> None:
    planned = Activated()
    with torch.no_grad():
        planned(TAKEN["both returned"][0])(*tensors(X, W, C, dtype=dtype))
    assert planned.calls == []
    assert activated(planned.before[0]) == planned.before[0]


def of_sizes(m: int, n: int, k: int) -> Plan:
    f = TAKEN["both returned"][0]
    return on_a_gpu(plan_on_fakes(f, (m, k), (n, k), (n,), dtype=BF16))


def test_a_plan_for_the_cpu_stays_as_it_is() -> None:
    before = replace(of_sizes(8192, 3072, 768), device="cpu")
    assert activated(before) == before


@pytest.mark.parametrize(
    ("m", "n", "k", "taken"),
    [
        (8192, 3072, 768, True),
        (4096, 4096, 1024, True),
        (6304, 3072, 768, True),
        (8192, 3072, 3072, False),  # the kernel takes a tenth of the product
        (4096, 16384, 4096, False),
    ],
)
def test_what_gains_is_taken(m: int, n: int, k: int, taken: bool) -> None:
    """The first three were measured to, on an H100."""
    before = of_sizes(m, n, k)
    assert (activated(before) != before) == taken


def test_devices_that_were_not_measured() -> None:
    before = of_sizes(8192, 3072, 768)
    assert with_activations(before, DEVICES["a100"], {}) == before
    slow = replace(H100, gelu_beside_product=2.0)
    assert with_activations(before, slow, {}) == before


def test_its_price_and_bytes() -> None:
    """The products of it take as much longer as the device's row says; both results are written."""
    before = of_sizes(8192, 3072, 768)
    (call,) = (step for step in activated(before).steps if isinstance(step, AtenStep))
    specs = {name: spec for name, spec in before.inputs if spec is not None}
    for step in before.steps:
        specs |= made(step)
    (plain,) = (step for step in before.steps if isinstance(step, AtenStep))
    ours, theirs = (price(call_of_step(step, specs)) for step in (call, plain))
    assert ours.read_bytes == theirs.read_bytes
    assert ours.written_bytes == 2 * theirs.written_bytes == 2 * 2 * 8192 * 3072
    longer, shorter = (contraction_time(each.contractions[0], H100) for each in (ours, theirs))
    assert longer == pytest.approx(1.4 * shorter)


def test_edges_are_gone_and_the_reason_stays() -> None:
    before = of_sizes(8192, 3072, 768)
    after = activated(before)
    assert [edge.consumer for edge in before.unfused if edge.producer == "addmm"] == ["gelu"]
    assert not any(edge.producer == "addmm" for edge in after.unfused)
    (call,) = (step for step in after.steps if isinstance(step, AtenStep))
    assert call.target == "iocompiler.addmm_gelu.default"
    assert call.reason == "contraction: cuBLAS"
    assert [name for name, _ in call.outputs] == ["gelu", "addmm"]
    assert not any(isinstance(step, KernelStep) for step in after.steps)
    assert obstacle(after, ()) == ""  # a CUDA graph can have it


def test_the_template_is_held_against_one_launch() -> None:
    """Not against a kernel that would not run."""
    there = of_sizes(8192, 3072, 768)
    (ours,) = priced(there, H100, {})
    (apart,) = priced(there, replace(H100, gelu_beside_product=None), {})
    assert ours.kernel_s == 0.0 < apart.kernel_s
    assert apart.library_s < ours.library_s < apart.library_s + apart.kernel_s


def test_what_the_product_becomes_meanwhile_is_not_what_was_multiplied() -> None:
    """Something else in its place is activated."""
    before = of_sizes(8192, 3072, 768)
    spec: TensorSpec = next(iter(made(before.steps[-1]).values()))
    inputs = (*before.inputs, ("other", spec))
    written = AtenStep(
        "aten.copy_.default", (Ref("addmm"), Ref("other")), (), ((None, None),), False
    )
    (at,) = (n for n, step in enumerate(before.steps) if isinstance(step, KernelStep))
    for place, taken in ((at, False), (at + 1, True)):
        steps = (*before.steps[:place], written, *before.steps[place:])
        changed = replace(before, inputs=inputs, steps=steps)
        assert (activated(changed) != changed) == taken


def test_sizes_that_are_not_known() -> None:
    """Any number of rows, of a width that is."""
    planned, f = Activated(), TAKEN["both returned"][0]
    x, w, c = tensors(X, W, C)
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(x, dim)
    with torch.no_grad():
        found = planned(f, dynamic=None)(x, w, c)
    assert planned.calls == ["addmm_gelu"]
    exact = f(x.double(), w.double(), c.double())
    assert_near_exact(listed(found), listed(f(x, w, c)), listed(exact), BF16)


def test_a_width_that_is_not_known_is_declined() -> None:
    planned, f = Activated(), TAKEN["both returned"][0]
    x, w, c = tensors(X, W, C)
    torch._dynamo.mark_dynamic(w, 0)
    torch._dynamo.mark_dynamic(c, 0)
    with torch.no_grad():
        found = planned(f, dynamic=None)(x, w, c)
    assert not planned.calls  # nor a bias: lines may begin amid vectors
    torch.testing.assert_close(found, f(x, w, c), rtol=2e-2, atol=2e-2)


STEPS: Mapping[str, tuple[Callable[..., Tensor], bool]] = {
    "feed forward": (lambda x, w, c, v: gelu(F.linear(x, w, c)) @ v, True),
    "by erf": (lambda x, w, c, v: F.gelu(F.linear(x, w, c)) @ v, False),
}


@pytest.mark.parametrize("name", STEPS)
def test_training(name: str) -> None:
    f, taken = STEPS[name]
    planned = Activated()

    def step(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor | None]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors(X, W, C, (24, 8))]
        out = function(*leaves)
        out.float().square().sum().backward()
        return [out, *(x.grad for x in leaves)]

    found = step(planned(f), BF16)
    assert ("addmm_gelu" in planned.calls) == taken
    assert_near_exact(found, step(f, BF16), step(f, torch.float64), BF16)


class Feed(torch.nn.Module):
    """Two linear layers around a GELU, with a dropout behind it or not."""

    def __init__(self, rate: float, approximate: str = "tanh") -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(768, 3072), torch.nn.Linear(3072, 768)
        self.rate, self.approximate = rate, approximate

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x), approximate=self.approximate)
        return self.down(F.dropout(hidden, self.rate, self.training))


@pytest.mark.parametrize(
    ("feed", "training", "device", "expected"),
    [
        (Feed(0.0), True, "h100", "iocompiler.addmm_gelu"),
        (Feed(0.0), True, "a100", "aten.addmm"),
        (Feed(0.0), False, "h100", "aten._addmm_activation"),  # nobody else reads the product
        (Feed(0.1), True, "h100", "aten.addmm"),  # one kernel with the activation
        (Feed(0.0, "none"), True, "h100", "aten.addmm"),
    ],
)
def test_explained(feed: Feed, training: bool, device: str, expected: str) -> None:
    given = torch.randn(8192, 768, dtype=BF16)
    report = ioc.explain(
        feed.to(BF16).train(training), given, device=device, training=training,
        compile_kernels=False,
    )  # fmt: skip
    up, *_ = (k for k in report.kernels if k.name.startswith(("aten.", "iocompiler.")))
    assert up.name == f"{expected}.default"
    assert up.source.endswith(", by addresses")
    kernels = [k for k in report.kernels if k.graph == "forward" and k.generated]
    assert bool(kernels) == (training and expected == "aten.addmm")
    assert not report.fallbacks
