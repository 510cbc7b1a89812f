"""The collector rests while a graph is compiled, and is as it was before, whatever happens."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from iocompiler.backend import Compiler
from iocompiler.garbage import uncollected


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    enabled = gc.isenabled()
    yield
    gc.enable() if enabled else gc.disable()


@pytest.mark.parametrize("enabled", [True, False])
def test_it_is_as_it_was(enabled: bool) -> None:
    gc.enable() if enabled else gc.disable()
    with uncollected():
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled() == enabled
    with pytest.raises(KeyError, match="of the caller"), uncollected():
        raise KeyError("of the caller")
    assert gc.isenabled() == enabled


def test_the_last_thread_that_leaves_wakes_it() -> None:
    gc.enable()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with uncollected():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with uncollected():
        thread.start()
        assert entered.wait(10)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


@pytest.mark.parametrize(("mode", "resting"), [("default", True), ("max-autotune", False)])
@pytest.mark.parametrize("fails", [False, True])
def test_a_compilation(mode: str, resting: bool, fails: bool) -> None:
    gc.enable()
    seen: list[bool] = []

    def engine(plan: Any, gm: torch.fx.GraphModule) -> Any:
        seen.append(not gc.isenabled())
        if fails:
            raise RuntimeError("of the engine")
        return lambda args: torch.fx.Interpreter(gm).boxed_run(args)

    def f(x: torch.Tensor) -> torch.Tensor:
        return x.sin().square()

    x = torch.randn(8, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = torch.compile(f, backend=Compiler(engine=engine), mode=mode)(x)
        out.sum().backward()
    assert seen == [resting] * 2
    assert gc.isenabled()
    torch.testing.assert_close(x.grad, 2 * x.detach().sin() * x.detach().cos())
