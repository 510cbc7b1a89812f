"""Whole programs through the walk, on plain aten and, planned, on the reference interpreter."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import iocompiler as ioc
from iocompiler.errors import FallbackWarning
from tests.compiling import check, compiled, copy, grad


@pytest.fixture(params=["aten", "reference"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_forward_and_backward(engine: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    records = check(lambda x: model(x).pow(2).sum(), grad(3, 4), engine=engine)
    assert len(records) == 1
    assert records[0].graph is not None


def test_parameters_get_gradients(engine: str) -> None:
    model = torch.nn.Linear(4, 4)
    run, _ = compiled(model, engine=engine)
    run(torch.ones(2, 4)).sum().backward()
    torch.testing.assert_close(model.bias.grad, torch.full((4,), 2.0))


def test_buffers_are_updated(engine: str) -> None:
    model = torch.nn.BatchNorm1d(4)
    other = torch.nn.BatchNorm1d(4)
    x = torch.randn(8, 4)
    run, _ = compiled(model, engine=engine)
    torch.testing.assert_close(run(x), other(x))
    torch.testing.assert_close(model.running_mean, other.running_mean)
    assert model.num_batches_tracked == 1


def test_mutation_of_an_input(engine: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return x + 1

    check(f, torch.randn(3), engine=engine)


def test_mutation_through_a_view(engine: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        x[1:].add_(1)
        return x.view(-1) * 2

    check(f, torch.randn(3, 2), engine=engine)


def test_outputs_that_are_views_and_inputs(engine: str) -> None:
    run, _ = compiled(lambda x: (x, x.t(), x[0]), engine=engine)
    x = torch.randn(2, 3)
    same, transposed, row = run(x)
    assert same is x
    assert transposed.data_ptr() == row.data_ptr() == x.data_ptr()


def test_in_place_operators_on_temporaries(engine: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.add_(1).mul_(3)
        y += x
        y.relu_()
        return y.sum()

    check(f, grad(5), engine=engine)


def test_no_grad_inside(engine: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = x.exp().sum()
        return (x * scale).sum()

    check(f, grad(4), engine=engine)


def test_autocast_inside_and_around(engine: str) -> None:
    linear = torch.nn.Linear(4, 4)

    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = linear(x).float() + linear(x)
        return (h * x).sum()

    check(f, grad(3, 4), engine=engine)

    def g(x: torch.Tensor) -> torch.Tensor:
        return linear(linear(x).relu())

    run, _ = compiled(g, engine=engine)
    x = torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, expected = run(x), g(x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected)


def test_dropout_repeats_under_a_seed(engine: str) -> None:
    run, _ = compiled(lambda x: torch.nn.functional.dropout(x, 0.5), engine=engine)
    x = torch.ones(1000)
    torch.manual_seed(3)
    first = run(x)
    torch.manual_seed(3)
    assert torch.equal(run(x), first)
    assert not torch.equal(run(x), first)
    assert 300 < int((first == 0).sum()) < 700


def test_checkpointed_regions(engine: str) -> None:
    linear = torch.nn.Linear(4, 4)

    def block(x: torch.Tensor) -> torch.Tensor:
        return linear(x).sin()

    check(lambda x: checkpoint(block, x, use_reentrant=False).sum(), grad(3, 4), engine=engine)


def test_custom_autograd_functions(engine: str) -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 5

    run, _ = compiled(lambda x: Twice.apply(x).sum(), engine=engine)
    x = grad(3)
    run(x).backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 5.0))


def test_dynamic_sizes_do_not_recompile(engine: str) -> None:
    linear = torch.nn.Linear(4, 4)

    def f(x: torch.Tensor) -> torch.Tensor:
        return (linear(x).reshape(-1, 2) * x.shape[0]).softmax(-1).sum()

    run, records = compiled(f, dynamic=True, engine=engine)
    for rows in (3, 6, 11):
        x = grad(rows, 4)
        y = copy(x)
        run(x).backward()
        f(y).backward()
        torch.testing.assert_close(x.grad, y.grad)
    assert len(records) == 1


def test_a_graph_break_gives_two_graphs(engine: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos().sum()

    assert len(check(f, grad(3))) == 2


def test_dropout_drops_the_same_in_the_backward(engine: str) -> None:
    run, _ = compiled(lambda x: torch.nn.functional.dropout(x.exp(), 0.5), engine=engine)
    x = torch.zeros(500, requires_grad=True)
    y = run(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())


def test_dropout_in_a_checkpointed_region(engine: str) -> None:
    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x.exp(), 0.5).sin()

    run, _ = compiled(
        lambda x: checkpoint(block, x, use_reentrant=False), engine=engine, strict=False
    )
    x = torch.zeros(500, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        y = run(x)
        y.sum().backward()
    torch.testing.assert_close(x.grad == 0, y == 0)


def test_scalars_kept_in_tensors(engine: str) -> None:
    check(lambda x, s: (x * s + s).sum(), grad(4, 3), torch.tensor(2.5), engine=engine)


def test_a_cache_written_in_place(engine: str) -> None:
    def f(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        cache[:, 1:3].copy_(x)
        return cache.sum(0) * 2

    check(f, torch.randn(4, 2), torch.zeros(4, 5), engine=engine)


def test_empty_tensors(engine: str) -> None:
    check(lambda x: (x.relu() + 1).sum(), grad(0, 3), engine=engine)


def test_constants_and_integers(engine: str) -> None:
    def f(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return (x[index] + torch.tensor([1.0, 2.0])).sum() + torch.arange(3).sum()

    check(f, grad(5, 2), torch.tensor([4, 0, 4]), engine=engine)


def _read_data(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    a = x @ w
    return a.sin() * a.data.min()


def _straight_through(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    a = x @ w
    return a + (a.round().data - a.data)


def _written_data(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    a = x @ w
    a.data.clamp_(-0.5, 0.5)
    return a.sin()


def _written_behind_autograd(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """What the backward of the sigmoid reads is changed, and nobody is told."""
    a = x @ w
    b = a.sigmoid()
    b.data.mul_(2)
    return b * a


def _weights_written(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    w.data.mul_(0.5)
    return (x @ w).sin()


@pytest.mark.parametrize(
    "function",
    [_read_data, _straight_through, _written_data, _written_behind_autograd, _weights_written],
)
def test_data_of_a_tensor(function: Any, engine: str) -> None:
    """``x.data`` is no operator, and what it shows is no constant."""
    check(function, grad(4, 8), grad(8, 8), engine=engine)


def test_data_of_a_tensor_is_explained() -> None:
    report = ioc.explain(
        _straight_through, grad(4, 8), grad(8, 8), device="h100", training=True,
        compile_kernels=False,
    )  # fmt: skip
    assert not report.fallbacks
