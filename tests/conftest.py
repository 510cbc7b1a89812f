"""Shared by every test: one thread, no Dynamo state from the test before, GPU tests skipped where
there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch.fx import GraphModule

from iocompiler.graph.capture import capture


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


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
