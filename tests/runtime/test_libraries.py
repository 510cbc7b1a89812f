"""Libraries that load while a graph is compiled."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from iocompiler.ops.attention import FORWARD
from iocompiler.runtime import libraries


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was loaded, in a process that has loaded nothing."""
    found: list[Any] = []
    monkeypatch.setattr(libraries, "_loading", None)
    monkeypatch.setattr(libraries, "_attend", lambda *given: found.append(given))
    yield found
    libraries.wait()


def calling(kernel: str, device: str) -> fx.GraphModule:
    graph = fx.Graph()
    query = graph.placeholder("query")
    with FakeTensorMode():
        query.meta["val"] = torch.empty(2, 3, 5, 32, dtype=torch.float16, device=device)
    call = graph.call_function(
        FORWARD, (query, query, query, None, 1.0, False, 0.0, kernel, "ssss")
    )
    graph.output(call)
    return fx.GraphModule({}, graph)


def test_once_in_a_process(begun: list[Any]) -> None:
    for _ in range(3):
        libraries.load_ahead(calling("cudnn", "cuda"))
    libraries.wait()
    assert begun == [(32, torch.float16, torch.device("cuda:0"))]


@pytest.mark.parametrize(("kernel", "device"), [("flash", "cuda"), ("cudnn", "cpu")])
def test_only_what_will_be_called(begun: list[Any], kernel: str, device: str) -> None:
    libraries.load_ahead(calling(kernel, device))
    libraries.wait()
    assert begun == []


def test_a_failure_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who calls the library will meet it, and say where."""
    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    libraries._attend(64, torch.int32, torch.device("cpu"))
    assert raised == []
