"""Where a template does not compile or cannot be launched, aten computes the same."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

import iocompiler as ioc
from iocompiler.errors import (
    CompileError,
    FallbackWarning,
    LaunchError,
    StrictFallback,
    UnboundedFallback,
)
from iocompiler.ops import attempt, embedding_gradient
from iocompiler.ops import linear_cross_entropy_rows as ce
from iocompiler.ops.scored_attention import scored_attention
from iocompiler.ops.scored_blockwise import Blockwise
from iocompiler.ops.target import planned_for
from tests.ops.score_programs import CASES, heads, reference
from tests.runtime.text_engine import TextEngine

REFUSED = LaunchError(kernel="k", action="loading", cause="out of shared memory")
BROKEN = CompileError(kernel="k", cause="no such instruction")


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "_told", set())


@pytest.fixture(params=[REFUSED, BROKEN], ids=["refused", "broken"])
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise request.param

    monkeypatch.setattr("iocompiler.runtime.template_launch.Launch.run", fail)


def test_what_is_told_once() -> None:
    def template() -> int:
        raise BROKEN

    with pytest.warns(FallbackWarning, match="a thing runs on aten: kernel 'k' does not compile"):
        assert attempt.template_or("a thing", template, lambda: 3) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attempt.template_or("a thing", template, lambda: 4) == 4
        assert attempt.template_or("a thing", lambda: 5, lambda: 6) == 5


def test_other_errors_are_the_users() -> None:
    def template() -> int:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        attempt.template_or("a thing", template, lambda: 3)


@pytest.mark.usefixtures("failing")
@pytest.mark.filterwarnings("ignore::iocompiler.FallbackWarning")
@pytest.mark.parametrize("name", CASES)
def test_attention(name: str) -> None:
    torch.manual_seed(0)
    case, given = CASES[name], [x.float() for x in heads(2, 4, 2, 17, 40, 16, 12)]
    operands = [x.float() if x.is_floating_point() else x for x in case.operands(2, 4, 17, 40)]
    runs = []
    for kernel in ("template", "blockwise"):
        leaves = [x.clone().requires_grad_() for x in given]
        learned = [x.clone().requires_grad_() if x.is_floating_point() else x for x in operands]
        out = scored_attention(*leaves, case.program(), learned, kernel=kernel)
        differentiable = [*leaves, *(x for x in learned if x.requires_grad)]
        torch.manual_seed(1)
        weights = torch.randn_like(out).masked_fill(out.isnan(), 0.0)
        runs.append([out, *torch.autograd.grad(out, differentiable, weights)])
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.usefixtures("failing")
def test_a_gradient_behind_a_forward_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logsumexp is to the base of two, with sinks the largest score and what is left apart."""
    case, given = CASES["sunk"], heads(1, 2, 2, 9, 11, 8, 8)
    operands = case.operands(1, 2, 9, 11)
    out, lse = Blockwise(*given, case.program(), operands, [], 0.0, None).forward()
    top = torch.randn_like(lse)
    both = torch.stack([top, lse / math.log(2) - top])

    def ran(problem: Any, into: Tensor) -> Tensor:
        into.copy_(out)
        return both

    leaves = [x.clone().requires_grad_() for x in given]
    with monkeypatch.context() as patch:
        patch.setattr("iocompiler.runtime.attention.forward", ran)
        ours = scored_attention(*leaves, case.program(), operands, kernel="template")
    with pytest.warns(FallbackWarning, match="the gradient of an attention"):
        found = torch.autograd.grad(ours, leaves, torch.ones_like(out))
    exact = [x.clone().requires_grad_() for x in given]
    true = reference(*exact, case.program(), operands)
    wanted = torch.autograd.grad(true, exact, torch.ones_like(out))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("onto", [False, True])
def test_the_gradient_of_an_embedding(onto: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> NoReturn:
        raise REFUSED

    monkeypatch.setattr(embedding_gradient, "_has_template", lambda *_: True)
    monkeypatch.setattr("iocompiler.runtime.embedding_gradient.accumulate", refused)
    grad, indices, base = torch.randn(5, 3), torch.tensor([1, 1, 0, 2, 2]), torch.randn(4, 3)
    expected = torch.zeros(4, 3).index_add(0, indices, grad)
    run = partial(embedding_gradient.ONTO, base) if onto else embedding_gradient.GRADIENT
    given = (grad, indices, -1) if onto else (grad, indices, 4, -1)
    with pytest.warns(FallbackWarning, match="embedding table"):
        found = run(*given)
    torch.testing.assert_close(found, expected + base if onto else expected)


def test_a_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> NoReturn:
        raise BROKEN

    monkeypatch.setattr(ce, "_has_template", lambda _: True)
    monkeypatch.setattr(ce, "launch_rows", refused)
    logits, target = torch.randn(4, 8), torch.tensor([1, 7, -100, 0])
    losses = torch.empty(4)
    with pytest.warns(FallbackWarning, match="a cross-entropy runs on aten"):
        ce.evaluate(ce.Piece(logits, target, losses), ce.Rows(), ce.Setting())
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(losses, expected)


# --- in a compiled graph


def looked_up(table: Tensor, indices: Tensor) -> Tensor:
    return torch.nn.functional.embedding(indices, table).tanh()


def step(**options: Any) -> str:
    """A training step of a lookup, by whose gradient the table is checked; what the cache did."""
    records: list[Any] = []
    torch._dynamo.reset()
    backend = ioc.Compiler(engine=TextEngine(), on_compiled=records.append, **options)
    run = torch.compile(looked_up, backend=backend)
    table, indices = torch.randn(40, 8, requires_grad=True), torch.arange(12) // 2
    exact = torch.autograd.grad(looked_up(table, indices).sum(), table)
    with planned_for((9, 0)):
        found = torch.autograd.grad(run(table, indices).sum(), table)
    torch.testing.assert_close(found, exact)
    return str(records[0].cache)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, told: None) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise REFUSED

    monkeypatch.setenv("IOCOMPILER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(embedding_gradient, "on_gpu", lambda x: True)
    monkeypatch.setattr(embedding_gradient, "_launch", refuse)


@pytest.mark.usefixtures("refused")
def test_the_warning_names_the_line() -> None:
    with pytest.warns(FallbackWarning, match=r"out of shared memory \(at test_attempt.py:\d+\)"):
        step()


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    ("options", "error"),
    [({"strict": True}, StrictFallback), ({"no_fallback": 10**9}, UnboundedFallback)],
)
def test_where_an_error_is_asked_for(
    options: dict[str, Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(embedding_gradient, "on_gpu", lambda x: False)
        assert step(**options) == "stored"
    told = r"embedding table failed.*: LaunchError: .*out of shared memory \(at test_attempt.py"
    if error is UnboundedFallback:
        told = told.replace(".*: L", " and would run on aten: L")
    with pytest.raises(error, match=told):
        step(cache=False, **options)
    monkeypatch.setattr(TextEngine, "__call__", lambda *_: pytest.fail("it is in the cache"))
    with pytest.raises(error, match=told):
        step(**options)
