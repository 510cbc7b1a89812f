"""How many kernels a graph becomes, and what passes through memory between them."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from iocompiler.plan.data import BatchStep, KernelStep
from tests.plan.graphs import Planned


def kernels_of(fn, *inputs, dynamic: bool = False) -> list[KernelStep]:
    planned = Planned()
    planned(fn, dynamic=dynamic)(*inputs)
    return planned.kernels


def test_layer_norm_is_one_kernel() -> None:
    inputs = [torch.randn(8, 64), torch.randn(64), torch.randn(64)]
    assert len(kernels_of(lambda x, w, b: F.gelu(F.layer_norm(x, (64,), w, b)), *inputs)) == 1


def test_softmax_with_mask_and_scale_is_one_kernel() -> None:
    mask = torch.ones(16, 16).tril().bool()
    fn = lambda s, m: (s * 0.125).masked_fill(~m, float("-inf")).softmax(-1)
    assert len(kernels_of(fn, torch.randn(4, 16, 16), mask)) == 1


@pytest.mark.parametrize(("width", "dtype"), [(32, torch.float32), (16384, torch.bfloat16)])
def test_layer_norm_backward_reads_its_input_once(width: int, dtype: torch.dtype) -> None:
    planned = Planned()
    x = torch.randn(64, width, dtype=dtype, requires_grad=True)
    w, b = (torch.randn(width, dtype=dtype, requires_grad=True) for _ in range(2))
    planned(lambda x, w, b: F.layer_norm(x, (width,), w, b))(x, w, b).sum().backward()
    backward = [s for s in planned.plans[1].steps if isinstance(s, KernelStep)]
    # dx and the partial sums of dw and db in one pass, then one kernel to fold the partials
    assert [s.schedule.kind == "rows" for s in backward] == [True, False]


def test_the_backward_of_written_slices_is_one_kernel() -> None:
    def written(x):
        y = x.clone()
        y[:, 1:3] = y[:, :2] * 2
        y[0] += 1
        return y.tanh()

    planned = Planned()
    planned(written)(torch.randn(4, 7, 16, requires_grad=True)).sum().backward()
    assert len(planned.plans[1].steps) == 1


def test_an_intermediate_used_inside_is_not_stored() -> None:
    (kernel,) = kernels_of(lambda x: (x.exp() + 1).log().sum(1), torch.randn(8, 32))
    assert sum(op.kind == "store" for op in kernel.program.ops) == 1


def test_a_cheap_value_is_recomputed_rather_than_stored() -> None:
    fn = lambda x, w: (F.relu(x).sum(1), (F.relu(x) @ w).sum(0))
    planned = Planned()
    planned(fn)(torch.randn(32, 16), torch.randn(16, 8))
    stored = [name for s in planned.kernels for name, _ in s.outputs]
    assert len([n for n in stored if n.startswith("relu")]) == 1


def test_no_cycle_through_a_matmul() -> None:
    def fn(x, w):
        y = x.relu()
        return y + (y @ w)

    planned = Planned()
    planned(fn)(torch.randn(8, 8), torch.randn(8, 8))
    assert len(planned.kernels) == 2
    (edge,) = [e for e in planned.plans[0].unfused if e.producer == "mm"]
    assert "call" in edge.reason


def test_what_is_as_large_is_told_in_the_order_of_the_graph() -> None:
    planned = Planned()
    weights = [torch.randn(64, 64) for _ in range(8)]
    planned(lambda x, *w: torch.cat([x @ each for each in w]))(torch.randn(64, 64), *weights)
    told = [e.producer for e in planned.plans[0].unfused if e.producer.startswith("mm")]
    assert told == ["mm", *(f"mm_{i}" for i in range(1, 8))]


def test_equal_layers_give_equal_programs() -> None:
    layers = torch.nn.Sequential(
        *[
            torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 16), torch.nn.GELU())
            for _ in range(3)
        ]
    )
    planned = Planned()
    with torch.no_grad():
        planned(layers)(torch.randn(4, 16))
    programs = [s.program for s in planned.kernels]
    # norm; gelu and the next norm, twice; gelu
    assert len(programs) == 4
    assert len(set(programs)) == 3


def test_optimizer_step_is_few_kernels() -> None:
    parameters = [torch.nn.Parameter(torch.randn(n, 3)) for n in (5, 8, 13, 21)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    for p, q in zip(parameters, twins, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    optimizer, twin = torch.optim.AdamW(parameters, lr=1e-2), torch.optim.AdamW(twins, lr=1e-2)
    planned = Planned()
    step = planned(optimizer.step)
    for _ in range(3):
        step()
        twin.step()
    for p, q in zip(parameters, twins, strict=True):
        torch.testing.assert_close(p, q)
    batches = [s for s in planned.plans[-1].steps if isinstance(s, BatchStep)]
    assert batches
    assert max(len(b.members) for b in batches) == 4


def test_small_independent_kernels_share_a_launch() -> None:
    planned = Planned()
    fn = lambda a, b, c: (a.exp(), b.sin(), c @ c, c.sum())
    inputs = [torch.randn(6, 7), torch.randn(6, 7), torch.randn(5, 5)]
    for got, want in zip(planned(fn)(*inputs), fn(*inputs), strict=True):
        torch.testing.assert_close(got, want)
    assert [len(s.outputs) for s in planned.kernels] in ([2, 1], [1, 2])


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [256, 2048])
def test_a_square_norm_backward_reads_its_rows_once(
    norm: str, dtype: torch.dtype, width: int
) -> None:
    """Over equal extents the columns of one sum could be taken for the rows of another, and half
    of the tensor be read across its rows.
    """
    planned = Planned()
    x = torch.randn(width, width, dtype=dtype, requires_grad=True)
    w, b = (torch.randn(width, dtype=dtype, requires_grad=True) for _ in range(2))
    if norm == "layer":
        y = planned(lambda x, w, b: F.layer_norm(x, (width,), w, b))(x, w, b)
    else:
        y = planned(lambda x, w: F.rms_norm(x, (width,), w))(x, w)
    y.backward(torch.randn_like(y))
    backward = [s for s in planned.plans[1].steps if isinstance(s, KernelStep)]
    assert [s.schedule.kind == "rows" for s in backward] == [True, False]


def test_a_number_made_of_few_is_computed_by_its_readers() -> None:
    """The scale of a loss's gradient: no kernel of its own for each."""

    def fn(x, w, total, count):
        scale = torch.where(count == 0, 0.0, total / count)
        return (x * scale) @ w - scale

    planned = Planned()
    given = torch.randn(5, 5), torch.randn(5, 5), torch.tensor(3.0), torch.tensor(7)
    torch.testing.assert_close(planned(fn)(*given), fn(*given))
    assert [len(step.outputs) for step in planned.kernels] == [1, 1]
    assert all(step.outputs[0][1].shape == (5, 5) for step in planned.kernels)


def test_a_number_that_is_overwritten_is_read_before() -> None:
    """A momentum of one element: both updates need its old value."""

    def fn(p, buffer, grad):
        buffer.mul_(0.9).add_(grad)
        p.sub_(buffer * 0.1)

    ours, theirs = ([torch.tensor(float(n)) for n in (1, 2, 3)] for _ in range(2))
    planned = Planned()
    planned(fn)(*ours)
    fn(*theirs)
    torch.testing.assert_close(ours, theirs)


def test_equal_reductions_of_one_calls_results_are_one_kernel() -> None:
    def fn(x):
        values, places = x.sort(1)
        return values.sum(0), places.amax(0), (places + 1).sum(0)

    x = torch.randn(6, 5)
    planned = Planned()
    for got, want in zip(planned(fn)(x), fn(x), strict=True):
        torch.testing.assert_close(got, want)
    assert [len(step.outputs) for step in planned.kernels] == [3]


def test_reductions_of_other_sizes_or_other_calls_are_not() -> None:
    def fn(x, y):
        values, places = x.sort(1)
        return values.sum(0), places.sum(1), y.sort(1)[0].sum(0)

    assert len(kernels_of(fn, torch.randn(6, 5), torch.randn(6, 5))) == 3


def test_a_long_chain_is_several_kernels() -> None:
    """What would lead too deep is not lowered as one."""

    def fn(x):
        for _ in range(120):
            x = (x + 0.5).sin()
        return x

    planned, limit = Planned(), sys.getrecursionlimit()
    x = torch.randn(4, 5)
    sys.setrecursionlimit(1000)  # Python's own; somebody in this process may have raised it
    try:
        found = planned(fn)(x)
    finally:
        sys.setrecursionlimit(limit)
    torch.testing.assert_close(found, fn(x))
    assert 1 < len(planned.kernels) < 20


def test_a_norm_of_few_long_rows_is_no_one_kernel() -> None:
    """Of 32 channels that lie apart one program would read all, twice; of many it is one. Mean and
    variance are one pass in parts, and their parts put together.
    """

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.batch_norm(x, None, None, training=True).relu()

    few, many = Planned(), Planned()
    x = torch.randn(4, 32, 64, 64).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(few(f)(x), f(x))
    many(f)(torch.randn(2, 2048, 8))
    parts, whole, pointwise = few.kernels
    assert parts.args[0] == pointwise.args[0]
    assert [a.size for a in whole.program.reduced] == [a.size for a in parts.program.parallel[:1]]
    assert pointwise.schedule.kind == "pointwise"
    assert len(many.kernels) == 1


@pytest.mark.parametrize("batch", [3, 67])
def test_running_statistics_are_written_by_the_kernel_that_finds_them(batch: int) -> None:
    """In one kernel, or where the parts are put together."""
    ours, theirs = torch.nn.BatchNorm2d(5), torch.nn.BatchNorm2d(5)
    planned = Planned()
    run = planned(ours)
    for _ in range(2):
        x = torch.randn(batch, 5, 40, 40)
        torch.testing.assert_close(run(x), theirs(x))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    sizes = [
        (k, b.elements) for k in planned.kernels for b in k.program.buffers if b.role == "inout"
    ]
    assert [bool(kernel.program.reduced) for kernel, size in sizes if size == 5] == [True, True]


def test_the_moments_of_one_number() -> None:
    x = torch.randn(())
    torch.testing.assert_close(
        Planned()(lambda x: torch.var_mean(x, correction=0))(x), torch.var_mean(x, correction=0)
    )


def test_what_several_rows_or_columns_overwrite_is_a_kernel_of_its_own() -> None:
    """A total of row sums, and sums down columns beside sums along rows: no program is alone."""

    def fn(x, total, columns):
        rows = (x * 2).sum(1)
        total.add_(rows.sum())
        columns.mul_(0.9).add_(x.sum(0))
        return rows

    given = torch.randn(300, 64), torch.randn(()), torch.randn(64)
    ours, theirs = ([t.clone() for t in given] for _ in range(2))
    torch.testing.assert_close(Planned()(fn)(*ours), fn(*theirs))
    torch.testing.assert_close(ours, theirs)
