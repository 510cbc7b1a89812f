"""Dynamo's settings during the calls of what `iocompiler.compile` returns."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.callback import callback_handler

import iocompiler as ioc
from iocompiler import dynamo_settings

logger = logging.getLogger("a.library")


def settings() -> dict[str, Any]:
    return dict(torch._dynamo.config.get_config_copy())


def logs(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    logger.warning("a guess")
    return y.cos()


class Compiled:
    """A function compiled by a backend that notes what it sees."""

    def __init__(self, function: Callable[..., Any], meanwhile: Callable[[], Any] = lambda: None):
        self.graphs: list[bool] = []  # for each, whether our settings were in force
        self._meanwhile = meanwhile
        self.call = dynamo_settings.with_settings(torch.compile(function, backend=self._backend))

    def _backend(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(torch._dynamo.config.capture_dynamic_output_shape_ops)
        self._meanwhile()
        return graph.forward


def test_a_users_code_sees_dynamos_own() -> None:
    before, seen = settings(), list[Any]()

    @torch._dynamo.disable
    def look() -> None:
        seen.append(settings())

    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        look()
        return y.cos()

    made = Compiled(f)
    for _ in range(2):
        made.call(torch.ones(3))
    assert seen == [before, before]
    assert made.graphs == [True, True]
    assert settings() == before


def test_they_hold_when_a_frame_is_compiled_again() -> None:
    made = Compiled(logs)
    for x in (torch.ones(3), torch.ones(3, dtype=torch.float64), torch.ones(2, 2)):
        torch.testing.assert_close(made.call(x), x.sin().cos())
    assert made.graphs == [True] * 3  # no graph ends at the logger


def test_they_hold_after_a_reset() -> None:
    made = Compiled(logs)
    made.call(torch.ones(3))
    torch._dynamo.reset()
    made.call(torch.ones(3))
    assert made.graphs == [True] * 2


def test_compiling_logs_no_error(caplog: pytest.LogCaptureFixture) -> None:
    record = logging.getLogger("torch._dynamo")
    propagates, record.propagate = record.propagate, True
    try:
        run = ioc.compile(logs, engine="aten")
        run(torch.ones(3, requires_grad=True)).sum().backward()
    finally:
        record.propagate = propagates
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_a_compilation_that_fails_ends_them() -> None:
    before = settings()

    def fails() -> None:
        raise ZeroDivisionError("of course")

    made = Compiled(torch.sin, fails)
    with pytest.raises(Exception, match="of course"):
        made.call(torch.ones(3))
    assert made.graphs == [True]
    assert settings() == before
    assert dynamo_settings._thread.calls == 0


def test_a_compilation_within_one() -> None:
    inner = Compiled(torch.cos)
    outer = Compiled(torch.sin, lambda: inner.call(torch.ones(3)))
    before = settings()
    outer.call(torch.ones(3))
    assert outer.graphs == [True]
    assert all(inner.graphs)
    assert settings() == before


def test_other_functions_keep_dynamos_own() -> None:
    seen: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        seen.append(torch._dynamo.config.capture_dynamic_output_shape_ops)
        return graph.forward

    Compiled(torch.sin).call(torch.ones(3))
    torch.compile(torch.cos, backend=backend)(torch.ones(3))
    assert seen == [False]


def test_a_caller_that_is_compiled_traces_through() -> None:
    run = ioc.compile(torch.sin, engine="aten")
    outer = torch.compile(lambda x: run(x) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(outer(torch.ones(3)), torch.ones(3).sin() + 1)


def test_threads_end_their_own() -> None:
    """Dynamo calls back in the thread that is the last of several to be done."""
    before, other, done = settings(), threading.Event(), threading.Event()

    def longer() -> None:
        with callback_handler.install_callbacks(*_about()):
            other.set()
            assert done.wait(60)

    thread = threading.Thread(target=longer)

    def meanwhile() -> None:
        thread.start()
        assert other.wait(60)

    made = Compiled(torch.sin, meanwhile)
    try:
        made.call(torch.ones(3))
    finally:
        done.set()
        thread.join()
    assert made.graphs == [True]
    assert settings() == before


def _about() -> tuple[Any, ...]:
    from torch._dynamo.callback import CallbackTrigger

    return CallbackTrigger.LAZY_BACKWARD, "0/0"
