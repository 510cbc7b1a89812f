from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from iocompiler.errors import CaptureFailed
from iocompiler.graph import view
from iocompiler.graph.capture import capture

aten = torch.ops.aten
Captured = Callable[..., GraphModule]


def _targets(gm: GraphModule) -> list[Any]:
    return [node.target for node in view.calls(gm)]


def test_composite_operators_stand_whole(captured: Captured) -> None:
    linear = torch.nn.Linear(8, 8)

    def f(x: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.layer_norm(linear(x), (8,))
        h = torch.nn.functional.scaled_dot_product_attention(h, h, h)
        return torch.nn.functional.dropout(torch.softmax(h, -1), 0.5)

    assert _targets(captured(f, torch.randn(2, 3, 8))) == [
        aten.linear.default,
        aten.layer_norm.default,
        aten.scaled_dot_product_attention.default,
        aten.softmax.int,
        aten.dropout.default,
    ]


def test_dynamos_graph_is_not_changed() -> None:
    before: list[str] = []
    after: list[str] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        before.append(gm.print_readable(print_output=False))
        capture(gm, inputs)
        after.append(gm.print_readable(print_output=False))
        return gm.forward

    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        y.unsqueeze_(0)
        return y.mul_(2)

    x = torch.randn(3)
    assert torch.equal(torch.compile(f, backend=backend)(x), x.sin().unsqueeze(0) * 2)
    assert before == after


def test_every_call_has_a_value_and_the_users_line(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        return y + 1

    gm = captured(f, torch.randn(2, 5))
    exp, add = view.calls(gm)
    line = f.__code__.co_firstlineno
    assert view.where(exp) == f"test_capture.py:{line + 1}"
    assert view.where(add) == f"test_capture.py:{line + 2}"
    assert view.source(exp) == "y = x.exp()"
    assert view.value(add).shape == (2, 5)


def test_mutation_of_an_input_stays(captured: Captured) -> None:
    def f(x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        buffer.add_(1)
        return x * buffer

    gm = captured(f, torch.randn(3), torch.zeros(3))
    assert _targets(gm) == [aten.add_.Tensor, aten.mul.Tensor]


def test_metadata_mutation_of_an_input_does_not_reach_the_example() -> None:
    graph = torch.fx.symbolic_trace(lambda x: x.unsqueeze_(0) + 1)
    with FakeTensorMode():
        x = torch.empty(3)
    gm = capture(graph, [x])
    assert x.shape == (3,)
    assert view.value(list(view.calls(gm))[-1]).shape == (1, 3)


def test_grad_mode_and_autocast_are_nodes(captured: Captured) -> None:
    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = x.sum()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ w
        return y * scale

    gm = captured(f, torch.randn(3, 3), torch.randn(3, 3))
    regions = view.regions(gm)
    by_target = {node.target: node for node in view.calls(gm)}
    total, matmul = by_target[aten.sum.default], by_target[aten.matmul.default]
    product = by_target[aten.mul.Tensor]
    assert view.value(matmul).dtype == torch.bfloat16
    assert len({regions[total], regions[matmul], regions[product]}) == 3
    assert regions[product] == regions[gm.graph.find_nodes(op="placeholder")[0]]


def test_a_checkpointed_region_is_entered(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return checkpoint(lambda t: t.sin() @ t, x, use_reentrant=False) * 2

    gm = captured(f, torch.randn(3, 3, requires_grad=True))
    ((node, inner),) = view.checkpoints(gm)
    assert _targets(inner) == [aten.sin.default, aten.matmul.default]
    assert view.value(list(view.calls(inner))[-1]).dtype == torch.bfloat16
    assert view.regions(gm)[node].autocast == (("cpu", torch.bfloat16),)


def test_a_region_with_its_own_policy_is_left_alone(captured: Captured) -> None:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    def f(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda t: t.sin(), x, use_reentrant=False, context_fn=contexts)

    gm = captured(f, torch.randn(3, requires_grad=True))
    assert torch.ops.higher_order.tag_activation_checkpoint in _targets(gm)
    assert view.checkpoints(gm) == []


def test_sizes_stay_symbols(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0] * 2, -1) * x.shape[0]

    gm = captured(f, torch.randn(6, 4), dynamic=True)
    shape = view.value(list(view.calls(gm))[-1]).shape
    assert all(isinstance(size, torch.SymInt) for size in shape)


def test_constants_of_the_program_are_attributes(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor([1.0, 2.0, 3.0])

    gm = captured(f, torch.randn(3))
    assert torch.equal(gm(torch.zeros(3))[0], torch.tensor([1.0, 2.0, 3.0]))


def test_views_and_aliases(captured: Captured) -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x.view(-1)
        return y[1:], x.t()

    x = torch.randn(2, 3)
    first, second = captured(f, x)(x)
    assert torch.equal(first, x.view(-1)[1:])
    assert torch.equal(second, x.t())


def test_conditions_are_left_alone(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,))

    assert torch.ops.higher_order.cond in _targets(captured(f, torch.randn(3)))


def test_data_dependent_sizes(captured: Captured) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x[x.nonzero().squeeze(1)] * 2

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        gm = captured(f, torch.tensor([0.0, 1.0, 2.0]))
    assert aten.nonzero.default in _targets(gm)


def test_tensor_subclasses_are_refused() -> None:
    x = TwoTensor(torch.randn(3), torch.randn(3))
    with pytest.raises(CaptureFailed, match="tensor subclass"):
        capture(torch.fx.symbolic_trace(lambda t: t + 1), [x])


def test_without_dynamo() -> None:
    graph = torch.fx.symbolic_trace(lambda x: torch.nn.functional.silu(x))
    gm = capture(graph, [torch.randn(2)])
    assert _targets(gm) == [aten.silu.default]


def test_a_kernel_of_the_users_that_only_writes() -> None:
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    out = graph.call_function(torch.empty_like, (x,))
    kernel = graph.call_function(
        triton_kernel_wrapper_mutation, (), {"kernel_idx": 0, "kwargs": {"x": x, "out": out}}
    )
    graph.output((graph.call_function(torch.sin, (out,)),))
    gm = capture(torch.fx.GraphModule(torch.nn.Module(), graph), [torch.randn(3)])
    (found,) = view.calls(gm, triton_kernel_wrapper_mutation)
    assert set(view.mutates(found)) == set(found.all_input_nodes)
    assert len(found.all_input_nodes) == len(kernel.all_input_nodes)


def test_what_no_operator_computes_is_no_constant() -> None:
    """A call past torch's dispatcher leaves no trace: its result would stand as a constant."""

    def untraced(x: torch.Tensor) -> torch.Tensor:
        with disable_proxy_modes_tracing():
            return x + 1

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.mul, (graph.call_function(untraced, (x,)), x)),))
    gm = GraphModule({}, graph)
    with pytest.raises(CaptureFailed, match="not traced is read by"):
        capture(gm, [torch.randn(3)])
