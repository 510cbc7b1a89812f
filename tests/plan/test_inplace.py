"""Results written over what a kernel reads for the last time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.cost_model.device import DEVICES
from iocompiler.plan.build import build_plan
from iocompiler.plan.data import KernelStep, Plan, ViewStep
from iocompiler.plan.sites import sites
from tests.accuracy import relative_error


def compiled(
    function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False
) -> tuple[Compilation, Any]:
    records: list[Compilation] = []
    torch._dynamo.reset()
    compiler = Compiler(engine="reference", strict=True, on_compiled=records.append)
    found = torch.compile(function, backend=compiler, dynamic=dynamic)(*inputs)
    (record,) = records
    return record, found


def over(plan: Plan) -> list[str]:
    """The results that take no memory: kernels write views."""
    views = {step.name for step in plan.steps if isinstance(step, ViewStep)}
    found = []
    for step in plan.steps:
        if isinstance(step, KernelStep):
            buffers = zip(step.args, step.program.buffers, strict=True)
            found += [name for name, b in buffers if b.role == "out" and name in views]
    return found


X, W = torch.randn(6, 8), torch.randn(8, 8)


def bias_and_gelu(x: Tensor, w: Tensor) -> Tensor:
    return F.gelu(x @ w + 1)


def twice(x: Tensor, w: Tensor) -> Tensor:
    return ((x @ w).sin() @ w).cos()


def other_shape(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).sin().view(2, 3, 8) * 2


def column_sums(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = (x @ w).exp()
    return y, y.sum(0)


def summed(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).cumsum(1)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [bias_and_gelu, twice, other_shape, column_sums, summed])
def test_taken(function: Callable[..., Any], dynamic: bool) -> None:
    record, found = compiled(function, X, W, dynamic=dynamic)
    assert over(record.plans["inference"])
    torch.testing.assert_close(found, function(X, W))


def an_input(x: Tensor, w: Tensor) -> Tensor:
    return x.sin() + w[:6]


def read_again(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return y.sin() @ (y.t() @ y)


def returned(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ w
    return y, y.sin()


def returned_view(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ w
    return y.t(), y.sin()


def turned(x: Tensor, w: Tensor) -> Tensor:
    return (w @ w).t().sin().contiguous()


def flipped(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).flip(0).sin()


def narrower(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).to(torch.float16)


def broadcast(x: Tensor, w: Tensor) -> Tensor:
    return (x[:1] @ w).sin().expand(6, 8) * x


def with_itself(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return y.sin() + y.flip(1)


@pytest.mark.parametrize(
    "function",
    [an_input, read_again, returned, returned_view, turned, flipped, narrower, broadcast,
     with_itself],
)  # fmt: skip
def test_declined(function: Callable[..., Any]) -> None:
    record, found = compiled(function, X, W)
    assert not over(record.plans["inference"])
    torch.testing.assert_close(found, function(X, W))


@pytest.fixture
def world() -> Iterator[None]:
    """Of two ranks, of which there is one: what collectives give is not filled."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world")
def test_what_a_collective_still_reads() -> None:
    def sent(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ops, rows = torch.ops._c10d_functional, x @ w
        under_way = ops.all_gather_into_tensor(rows, 2, dist.group.WORLD.group_name)
        other = rows.sin() @ w
        return ops.wait_tensor(under_way), other

    record, (_, found) = compiled(sent, X, W)
    assert not over(record.plans["inference"])
    torch.testing.assert_close(found, (X @ W).sin() @ W)


def softmax(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).softmax(-1)


@pytest.mark.parametrize(("width", "taken"), [(300, 1), (20000, 0)])
def test_a_long_row_is_read_in_passes(width: int, taken: int) -> None:
    x, w = torch.randn(2, 4), torch.randn(4, width)
    record, found = compiled(softmax, x, w)
    assert len(over(record.plans["inference"])) == taken
    torch.testing.assert_close(found, softmax(x, w))


def test_a_fold_comes_first() -> None:
    record, _ = compiled(bias_and_gelu, X, W)
    assert over(record.plans["inference"])
    assert not sites(record.plans["inference"])
    assert sites(build_plan(record.flat["inference"], DEVICES["h200"], "inference"))


def test_a_training_step() -> None:
    def mlp(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return (F.gelu(x @ w) @ v).square().mean()

    given = [t.detach().requires_grad_() for t in (X, W, torch.randn(8, 8))]
    wide = [t.detach().double().requires_grad_() for t in given]
    records: list[Compilation] = []
    torch._dynamo.reset()
    run = torch.compile(
        mlp, backend=Compiler(engine="reference", strict=True, on_compiled=records.append)
    )
    loss = run(*given)
    grads = torch.autograd.grad(loss, given, retain_graph=True)
    assert over(records[0].plans["backward"])
    for repeated in (grads, torch.autograd.grad(loss, given)):
        for ours, exact in zip(repeated, torch.autograd.grad(mlp(*wide), wide), strict=True):
            assert relative_error(ours, exact) < 1e-5


def test_a_row_sum_stays_apart_from_what_is_read_after_it() -> None:
    """Results of rows are stored before numbers of rows are loaded, by several threads."""

    def norms(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w
        scale = (y @ w[:, :1]).squeeze(1)
        total = y.square().sum(1)
        return total, (y * 2 - total[:, None]) * scale[:, None]

    record, found = compiled(norms, X, W)
    plan = record.plans["inference"]
    rows = {n for step in plan.steps if isinstance(step, KernelStep) for n, _ in step.outputs}
    assert not [name for name in over(plan) if name in rows]
    for ours, exact in zip(found, norms(X, W), strict=True):
        torch.testing.assert_close(ours, exact)
