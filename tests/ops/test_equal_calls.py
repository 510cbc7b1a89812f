"""Equal calls of a joint graph: merged where torch merges them, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networkx.algorithms.flow import preflow_push
from torch import Tensor
from torch._functorch import partitioners
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from iocompiler.ops import partition
from iocompiler.ops.equal_calls import merge_equal_calls
from tests.ops.test_partition import parts_of

aten = torch.ops.aten


def traced(f: Callable[..., Any], dynamic: bool = False) -> GraphModule:
    mode: Any = "symbolic" if dynamic else "fake"
    graph: GraphModule = make_fx(f, tracing_mode=mode)(torch.randn(4, 6), torch.randn(6))
    return graph


def chain(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """What is made of equal values is equal, too."""
    return (x.t().cos().sin() * 2, x.t().cos().sin().exp())


def numbers(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return ((x * 1).exp(), (x * 1.0).exp(), (x * True).exp())


def keywords(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    half, whole = torch.float16, torch.float32
    casts = [aten._to_copy.default(x, dtype=kind) for kind in (half, half, whole)]
    return tuple(cast.exp() for cast in casts)


def lists(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return torch.cat([x, x]).exp(), torch.cat([x, x], 1).exp(), torch.cat([x, x]).sin()


def several_results(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x.max(1)[0].exp(), x.max(1)[1] + 1, x.max(1)[0].sin()


def returned(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Two results stay two, and so do their views."""
    return x.exp(), x.exp(), x.exp().sum()


def written(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    before = y.sin().sum()
    y.copy_(x[0])
    return before * 2, y.sin().sum() * 3, y.sin().sum() * 4


CASES = {chain: 3, numbers: 0, keywords: 1, lists: 1, several_results: 6, returned: 0, written: 2}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("f", CASES, ids=lambda f: f.__name__)
def test_as_torch_does(f: Callable[..., Any], dynamic: bool) -> None:
    graph, theirs = traced(f, dynamic), traced(f, dynamic)
    before = len(graph.graph.nodes)
    merge_equal_calls(graph)
    graph.graph.lint()
    assert str(graph.graph) == str(fx_graph_cse(theirs.graph))
    if not dynamic:
        assert before - len(graph.graph.nodes) == CASES[f]


def test_random_numbers_differ() -> None:
    graph = traced(lambda x, y: (torch.rand_like(x).exp(), torch.rand_like(x).exp()))
    before = len(graph.graph.nodes)
    merge_equal_calls(graph)
    assert len(graph.graph.nodes) == before


def test_nothing_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would import Inductor."""

    def forbidden(graph: Any) -> None:
        raise AssertionError("torch looks for equal calls")

    monkeypatch.setattr(partitioners, "fx_graph_cse", forbidden)
    x = torch.randn(4, 6, requires_grad=True)
    forward, _ = parts_of(lambda x: x.sin().exp() + x.sin().cos(), x)
    assert len(forward.graph.find_nodes(op="call_function", target=aten.sin.default)) == 1


def test_the_cut_is_that_of_any_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    def f(x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.softmax(x @ x.t().exp(), -1) @ x.sigmoid().tanh() + x.sum(0)
        return x

    x = torch.randn(5, 6, requires_grad=True)
    found = [str(part.graph) for part in parts_of(f, x)]
    monkeypatch.setattr(partition, "boykov_kolmogorov", preflow_push)
    assert [str(part.graph) for part in parts_of(f, x)] == found
