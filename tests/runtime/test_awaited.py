"""Kernels that are still being compiled when a graph is handed out: waited for at the first call,
and what then fails runs on aten.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import iocompiler as ioc
from iocompiler.awaited import awaited
from iocompiler.compilation import Compilation
from iocompiler.errors import CompileError, FallbackWarning, StrictFallback
from iocompiler.plan.data import Plan
from iocompiler.runtime.load import begin
from iocompiler.runtime.module import Module
from tests.compiling import grad
from tests.runtime.plans import binary, kernel, plan, spec
from tests.runtime.text_engine import TextEngine

_ON_ATEN = "not cached: a part of it runs on aten"


class Engine(TextEngine):
    """Its kernels are ready when they are waited for; those of the graphs with the numbers
    ``failing`` do not compile. ``waited`` has the numbers of the others, in order.
    """

    def __init__(self, *failing: int) -> None:
        super().__init__()
        self.failing, self.count, self.waited = failing, 0, list[int]()

    def __call__(self, plan: Plan, gm: GraphModule) -> Callable[[list[Any]], list[Any]]:
        run: Any = super().__call__(plan, gm)
        number = self.count
        self.count += 1

        def ready() -> None:
            if number in self.failing:
                raise CompileError(kernel="k", cause="out of registers", where="model.py:1")
            self.waited.append(number)

        run.ready = ready
        made: Callable[[list[Any]], list[Any]] = run
        return made


def model(x: Tensor, w: Tensor) -> Tensor:
    hidden = (x.exp() @ w).sigmoid()
    return ((hidden * 2).tanh() + hidden.cos()) @ w.t()


def compiled(
    engine: Engine, dynamic: bool | None = None, **options: Any
) -> tuple[Callable[..., Any], list[Compilation]]:
    """With dynamic sizes, the backward is compiled before the forward runs."""
    torch._dynamo.reset()
    records: list[Compilation] = []
    backend = ioc.Compiler(engine=engine, on_compiled=records.append, **options)
    return torch.compile(model, backend=backend, dynamic=dynamic), records


def hold_against_eager(run: Callable[..., Any]) -> None:
    x, w = grad(6, 6), grad(6, 6)
    found, expected = run(x, w), model(x, w)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), (x, w)) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_who_calls_first_waits() -> None:
    engine = Engine()
    run, _ = compiled(engine, dynamic=True)
    x, w = grad(6, 6), grad(6, 6)
    loss = run(x, w).sum()
    assert (engine.count, engine.waited) == (2, [0]), "the backward's nobody needs yet"
    loss.backward()
    assert engine.waited == [0, 1]
    hold_against_eager(run)
    assert engine.waited == [0, 1], "once"


def test_without_a_gradient() -> None:
    run, records = compiled(Engine(0))
    x, w = torch.randn(6, 6), torch.randn(6, 6)
    with pytest.warns(FallbackWarning, match=r"inference failed.*aten: CompileError: kernel"):
        torch.testing.assert_close(run(x, w), model(x, w))
    torch.testing.assert_close(run(x, w), model(x, w))
    assert [(lost.region, lost.where) for lost in records[0].fallbacks] == [
        ("inference", "model.py:1")
    ]
    assert records[0].cache == _ON_ATEN


def test_a_forward_that_fails_takes_a_backward_that_writes_over_its_results_along() -> None:
    engine = Engine(0)
    run, records = compiled(engine, dynamic=True)
    with pytest.warns(FallbackWarning) as told:
        hold_against_eager(run)
    hold_against_eager(run)
    assert [lost.region for lost in records[0].fallbacks] == ["forward", "backward"]
    assert "it was compiled for the planned forward" in str(told[1].message)
    assert engine.waited == []
    assert records[0].cache == _ON_ATEN


def test_a_backward_that_fails(cache_root: Path) -> None:
    run, records = compiled(Engine(1))
    with pytest.warns(FallbackWarning, match="backward failed"):
        hold_against_eager(run)
    assert [lost.region for lost in records[0].fallbacks] == ["backward"]
    assert records[0].cache == _ON_ATEN
    assert not any((cache_root / "graphs").glob("*/meta.json")), "it is taken back"


def test_strict() -> None:
    run, _ = compiled(Engine(0), strict=True)
    with pytest.raises(StrictFallback, match="out of registers"), torch.no_grad():
        run(torch.randn(6, 6), torch.randn(6, 6))


def test_threads_that_call_at_once_settle_it_once() -> None:
    asked: list[int] = []
    both = threading.Barrier(2, timeout=10)

    def settled() -> Callable[[list[Any]], list[Any]]:
        asked.append(1)
        time.sleep(0.05)  # the other thread is waiting by now
        return lambda args: args

    call, found = awaited(lambda args: [], settled), list[Any]()

    def first() -> None:
        both.wait()
        found.append(call([1]))

    threads = [threading.Thread(target=first) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (found, asked) == ([[1], [1]], [1])


# --- in the background


def doubling() -> Plan:
    return plan({"x": spec(8)}, [kernel("add", binary("add", 8), ("x", "x", "a"), spec(8))], ())


@pytest.fixture
def compile_later(monkeypatch: pytest.MonkeyPatch) -> Future[None]:
    """Kernels of a GPU that is not there, compiled when this is done."""
    done = Future[None]()
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(Module, "_capability", 90)
    monkeypatch.setattr(Module, "compile", lambda module, capability: done.result())
    monkeypatch.setattr(Module, "_launch", lambda module, spec: print)
    return done


def begun() -> Any:
    return begin(doubling(), torch.device("cuda", 0))


def test_binding_waits_for_the_compiler(compile_later: Future[None]) -> None:
    call = begun()
    waiting = threading.Thread(target=call.ready)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    assert not call.module.bound
    compile_later.set_result(None)
    waiting.join(10)
    assert list(call.module.bound.values()) == [print]


def test_what_does_not_compile_is_told_to_who_waits(compile_later: Future[None]) -> None:
    call = begun()
    compile_later.set_exception(CompileError(kernel="add", cause="no such instruction"))
    for _ in range(2):
        with pytest.raises(CompileError, match="no such instruction"):
            call.ready()


def test_a_child_does_not_wait_for_its_parents_thread(
    compile_later: Future[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = begun()
    again: list[int] = []
    monkeypatch.setattr(os, "getpid", lambda: -1)
    monkeypatch.setattr(Module, "compile", lambda module, capability: again.append(capability))
    call.ready()
    assert again == [90]
    compile_later.set_result(None)
