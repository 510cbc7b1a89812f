"""Shared by every test: one thread, a seed, no Dynamo state from the test before, a cache of its
own.

GPU tests are skipped where there is none; slow tests unless ``--slow`` or an ``-m`` that names them
asks for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch.fx import GraphModule

from iocompiler.graph.capture import capture


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--fuzz", type=int, default=200, help="how many random programs to run")
    parser.addoption(
        "--seed", type=int, default=0, help="of the first random program, the order of operators"
    )
    parser.addoption(
        "--limit", type=float, default=float("inf"), help="seconds for the operators of torch"
    )
    parser.addoption("--share", default="1/1", help="2/3: the second third of torch's operators")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = config.getoption("--slow") or "slow" in config.getoption("-m")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and not slow:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither reads nor fills the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IOCOMPILER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _cublas() -> None:
    """The first product of a backward warns that its thread has no CUDA context."""
    if torch.cuda.is_available():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.randn(8, 8, device="cuda", requires_grad=True)
            (x @ x).sum().backward()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # other processes may test on the same card


@pytest.fixture
def captured() -> Callable[..., GraphModule]:
    """``captured(function, *inputs, dynamic=None)``: the pre-dispatch graph of its one Dynamo
    graph.
    """

    def run(function: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> GraphModule:
        graphs: list[GraphModule] = []

        def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            graphs.append(capture(gm, example_inputs))
            return gm.forward

        torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
        assert len(graphs) == 1
        return graphs[0]

    return run
