"""Operators that call functions (conditions, loops, scans, attention with a score), operators with
effects, and operators of the user's: each is a plain call, and everything around it is planned.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._higher_order_ops import associative_scan, scan
from torch._higher_order_ops.map import map as map_rows
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import iocompiler as ioc
from iocompiler.compilation import Compilation
from iocompiler.plan.contents import all_steps, regions
from iocompiler.plan.data import AtenStep, KernelStep, Region
from tests.accuracy import Results, compare
from tests.compiling import OLD_TORCH
from tests.runtime.text_engine import TextEngine

ENGINES = {"reference": lambda: "reference", "text": TextEngine}

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Any:
    return ENGINES[request.param]()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # of torch's own implementations of these operators
        warnings.filterwarnings("ignore", module=r"torch\._(higher_order_ops|functorch|dynamo).*")
        yield


def branch(x: Tensor, w: Tensor) -> Tensor:
    y = (x * 2).relu().sum(-1)
    (z,) = torch.cond(
        y.sum() > 0, lambda a, b: ((a.sin() + b).exp(),), lambda a, b: (a.cos() * b,), (x, w)
    )
    return (z * 3).tanh().softmax(-1)


def nested_branch(x: Tensor, w: Tensor) -> Tensor:
    def inner(a: Tensor, b: Tensor) -> Tensor:
        return torch.cond(b.sum() > 0, lambda a, b: a * b + 1, lambda a, b: a - b.exp(), (a, b))

    z = torch.cond(x.sum() > 0, inner, lambda a, b: a.clone(), (x * 2, w))
    return z.softmax(-1)


def linalg(x: Tensor, w: Tensor) -> Tensor:
    square = (x @ x.transpose(0, 1)) * 0.1
    square = square + torch.eye(x.shape[0], dtype=x.dtype, device=x.device)
    solved = torch.linalg.inv(square) @ w
    return (torch.linalg.cholesky(square) @ solved).softmax(-1)


def loop(x: Tensor, w: Tensor) -> Tensor:
    count = torch.zeros((), dtype=torch.int64)
    body = lambda i, a: (i + 1, (a.sin() + w).exp() * 0.1)
    _, a = torch.while_loop(lambda i, a: i < 3, body, (count, x * 2 + 1))
    return a.softmax(-1)


def scanned(x: Tensor, w: Tensor) -> Tensor:
    def step(carry: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        new = carry * w[0] + row
        return new, (new.sin() * 2).exp()

    last, rows = scan(step, torch.zeros_like(x[0]), (x * 2).tanh())
    return rows.exp().softmax(-1) + last


def scanned_columns(x: Tensor, w: Tensor) -> Tensor:
    def step(carry: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        new = carry * w[:, 0] + column
        return new, (new.sin() * 2).exp()

    _, columns = scan(step, torch.zeros_like(x[:, 0]), (x * 2).tanh(), dim=1)
    return columns.softmax(-1)


def prefix(x: Tensor, w: Tensor) -> Tensor:
    y = associative_scan(lambda a, b: a * b + 1, (x * 2).tanh(), 0, combine_mode="generic")
    return (y + w).softmax(-1)


def mapped(x: Tensor, w: Tensor) -> Tensor:
    return map_rows(lambda row, w: (row * w[0]).exp(), x * 2, w).softmax(-1)


def scores(x: Tensor, w: Tensor) -> Tensor:
    q = (x * 2).reshape(1, 2, -1, 16)
    bias = w[0].contiguous()
    score = lambda score, b, h, i, j: score + (i - j) * 0.1 + bias[h]
    out = flex_attention(q, q, q, score_mod=score, block_mask=_MASK)
    return (out.reshape(x.shape) + w).softmax(-1)


_MASK = create_block_mask(lambda b, h, i, j: i >= j, None, None, 4, 4, device="cpu")


@torch.compiler.nested_compile_region
def _block(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).exp().tanh()


def repeated(x: Tensor, w: Tensor) -> Tensor:
    return _block(_block(x, w), w).softmax(-1)


@torch.library.custom_op("iocompiler_tests::scale_", mutates_args={"out"})
def scale_(out: Tensor, factor: float) -> None:
    out.mul_(factor)


@torch.library.custom_op("iocompiler_tests::both", mutates_args=())
def both(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    return x.sin(), [x.cos(), x + 1]


@both.register_fake
def _(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(x), [torch.empty_like(x), torch.empty_like(x)]


def users_operator(x: Tensor, w: Tensor) -> Tensor:
    y = (x * 2).exp()
    scale_(y, 0.25)
    return (y + w).softmax(-1)


def nested_results(x: Tensor, w: Tensor) -> Tensor:
    a, (b, c) = both(x * 2)
    return (a * w + b - c).softmax(-1)


INFERENCE = [
    branch, nested_branch, linalg, loop, scanned, scanned_columns, mapped, scores,
    repeated, users_operator, nested_results,
]  # fmt: skip
TRAINING = [branch, nested_branch, linalg, mapped, repeated]


def _run(
    function: Callable[..., Tensor], dtype: torch.dtype, train: bool, device: str = "cpu"
) -> Results:
    generator = torch.Generator().manual_seed(3)
    x, w = (torch.randn(8, 16, generator=generator).to(device, dtype) for _ in range(2))
    x.requires_grad_(train), w.requires_grad_(train)
    result = function(x, w)
    if train:
        weights = torch.linspace(-1, 1, result.numel(), device=device).reshape(result.shape)
        (result * weights).sum().backward()
    return Results({"": result.detach()}, {"x": x.grad, "w": w.grad})


def _compiled(function: Callable[..., Any], engine: Any, **options: Any) -> Any:
    records: list[Compilation] = []
    backend = ioc.Compiler(engine=engine, strict=True, on_compiled=records.append)
    return torch.compile(function, backend=backend, fullgraph=True, **options), records


def _check(
    function: Callable[..., Any], engine: Any, train: bool, device: str = "cpu"
) -> list[Compilation]:
    run, records = _compiled(function, engine)
    ours = _run(run, torch.float32, train, device)
    eager, reference = (_run(function, d, train, device) for d in (torch.float32, torch.float64))
    wrong = [c for c in compare(ours, eager, reference, torch.float32) if not c.ok]
    assert not wrong, wrong
    return records


@pytest.mark.parametrize("function", INFERENCE, ids=lambda f: f.__name__)
def test_inference(function: Callable[..., Any], engine: Any) -> None:
    (record,) = _check(function, engine, train=False)
    steps = record.plans["inference"].steps
    # the softmax after it is fused, whatever stands before
    assert isinstance(steps[-1], KernelStep)
    assert "amax" in " ".join(steps[-1].nodes)


@pytest.mark.parametrize("function", TRAINING, ids=lambda f: f.__name__)
def test_training(function: Callable[..., Any], engine: Any) -> None:
    (record,) = _check(function, engine, train=True)
    assert record.plans.keys() == {"forward", "backward"}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "function", [f for f in INFERENCE if f is not scores], ids=lambda f: f.__name__
)
def test_inference_on_a_gpu(function: Callable[..., Any]) -> None:
    (record,) = _check(function, "auto", train=False, device="cuda")
    assert record.fallbacks == []


@pytest.mark.gpu
@pytest.mark.parametrize("function", TRAINING, ids=lambda f: f.__name__)
def test_training_on_a_gpu(function: Callable[..., Any]) -> None:
    (record,) = _check(function, "auto", train=True, device="cuda")
    assert record.fallbacks == []


@triton.jit
def _doubled(x, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


@pytest.mark.gpu
def test_a_kernel_of_the_users_on_a_gpu() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        y = (x * w).exp()
        out = torch.empty_like(y)
        _doubled[(triton.cdiv(y.numel(), 64),)](y, out, y.numel(), BLOCK=64)
        return (out + w).softmax(-1)

    run, records = _compiled(f, "auto")
    x, w = torch.randn(8, 16, device="cuda"), torch.randn(8, 16, device="cuda")
    torch.testing.assert_close(run(x, w), f(x, w))
    assert records[0].fallbacks == []


def test_what_cannot_be_captured_again_is_planned_all_the_same(engine: Any) -> None:
    backend_records: list[Compilation] = []
    backend = ioc.Compiler(engine=engine, on_compiled=backend_records.append)
    x, w = torch.randn(8, 16), torch.randn(8, 16)
    with pytest.warns(ioc.FallbackWarning, match="runs unrewritten"):
        found = torch.compile(prefix, backend=backend, fullgraph=True)(x, w)
    torch.testing.assert_close(found, prefix(x, w))
    assert isinstance(backend_records[0].plans["inference"].steps[-1], KernelStep)


def _inside(record: Compilation) -> list[Region]:
    calls = [step for step in record.plans["inference"].steps if isinstance(step, AtenStep)]
    return [region for step in calls for region in regions(step.args)]


def test_functions_that_are_only_called_are_planned() -> None:
    for function in (branch, loop, scanned, mapped, repeated):
        (record,) = _check(function, "reference", train=False)
        found = _inside(record)
        assert any(isinstance(step, KernelStep) for r in found for step in r.plan.steps), function


def test_functions_under_a_transform_are_calls() -> None:
    (record,) = _check(scores, "reference", train=False)
    score, mask = _inside(record)
    assert {type(step) for r in (score, mask) for step in r.plan.steps} == {AtenStep}


CHECKED = pytest.mark.skipif(
    OLD_TORCH,
    reason="AOTAutograd drops the checks of torch.linalg, with any backend",
)


@CHECKED
def test_effects_lose_their_tokens_and_stay_in_order() -> None:
    (record,) = _check(linalg, "reference", train=True)
    calls = [s for s in record.plans["forward"].steps if isinstance(s, AtenStep)]
    checks = [s.args[1] for s in calls if s.target == "aten._linalg_check_errors.default"]
    assert checks == ["linalg.inv", "linalg.cholesky"]


@CHECKED
def test_an_error_is_raised_as_in_eager(engine: Any) -> None:
    run, _ = _compiled(linalg, engine)
    with pytest.raises(torch.linalg.LinAlgError, match="linalg"):
        run(torch.full((8, 16), float("nan")), torch.zeros(8, 16))


@CHECKED
def test_why_it_is_not_cached() -> None:
    reasons = {
        branch: "not cached: it calls the higher-order operator cond",
        linalg: "not cached: it has effects, which run in order",
    }
    for function, reason in reasons.items():
        (record,) = _check(function, TextEngine(), train=False)
        assert record.cache == reason


def test_dynamic_sizes(engine: Any) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        z = torch.cond(x.sum() > 0, lambda a: a * x.shape[0], lambda a: a[:, :1] + w, (x * 2,))
        return z.softmax(-1)

    run, records = _compiled(f, engine, dynamic=True)
    for rows, columns in ((3, 5), (7, 4), (20, 33)):
        x, w = torch.randn(rows, columns), torch.randn(rows, columns)
        for each in (x.abs(), -x.abs()):
            torch.testing.assert_close(run(each, w), f(each, w))
    assert len(records) == 1


def test_dropout_in_a_checkpoint_is_drawn_again_as_it_was(engine: Any) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        y = checkpoint(
            lambda a: torch.nn.functional.dropout(a * w, 0.5).tanh(), x, use_reentrant=False
        )
        return y.softmax(-1)

    run, records = _compiled(f, engine)
    x, w = torch.randn(64, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    torch.manual_seed(1)
    found = torch.autograd.grad(run(x, w).square().sum(), (x, w))
    torch.manual_seed(1)
    expected = torch.autograd.grad(f(x, w).square().sum(), (x, w))
    torch.testing.assert_close(found, expected)
    assert records[0].plans.keys() == {"forward", "backward"}


def test_launches_inside_of_regions_are_counted() -> None:
    (record,) = _check(branch, "reference", train=False)
    plan = record.plans["inference"]
    assert len(list(all_steps(plan))) > len(plan.steps)
