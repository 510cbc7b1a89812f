"""Inputs of which a few places are written: where they are, and nothing else of them is moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from iocompiler.compilation import Compilation
from iocompiler.cost_model.device import DEVICES
from iocompiler.plan.data import AtenStep, KernelStep, Plan
from iocompiler.report.build import Part, build_report
from tests.compiling import compiler

aten = torch.ops.aten
Function = Callable[..., Any]
SHAPE = (2, 3, 16, 8)


def cache(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape or SHAPE).to(dtype)


def new(count: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, count, 8).to(dtype)


def compiled(f: Function, *given: Tensor, dynamic: bool = False, **options: Any) -> Compilation:
    """Held against eager in float64: results, and what becomes of the inputs."""
    records: list[Compilation] = []
    torch._dynamo.reset()
    ours = [x.clone(memory_format=torch.preserve_format) for x in given]
    theirs = [x.double() if x.is_floating_point() else x.clone() for x in given]
    with torch.no_grad():
        found = compiler(records, dynamic=dynamic, **options)(f)(*ours)
        expected = f(*theirs)
    pairs = [*zip(ours, theirs, strict=True)]
    if isinstance(expected, Tensor):
        pairs.append((found, expected))
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)
    (record,) = records
    return record


def sites(record: Compilation) -> int:
    return sum(each.pattern == "updates" for each in record.rewrites)


def steps(record: Compilation) -> list[Any]:
    (plan,) = record.plans.values()
    return [s for s in plan.steps if isinstance(s, (AtenStep, KernelStep))]


def index_copied(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    c.index_copy_(2, at, k * 2)
    return c.sum(-1)


def indexed(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    c[:, :, at] = k
    return c.exp()


def counted_from_the_end(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    c[:, :, at - 16] = k
    return c.exp()


def by_two_indices(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    c[at % 2, :, at] = k[0].transpose(0, 1)
    return c.exp()


def read_before(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    before = c.sum(-1)
    c.index_copy_(2, at, k)
    return before + c.sum(-1)


def written_alone(c: Tensor, at: Tensor, k: Tensor) -> None:
    c.index_copy_(2, at, k)


def read_through_views(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    c.index_copy_(2, at, k)
    return c.transpose(1, 2)[:, 1:] @ k[:, :, 0].mT.unsqueeze(1)


def normalised(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    c.index_copy_(2, at, torch.nn.functional.rms_norm(k, [8]))
    return c.sum(-1)


def read_as_it_was_of_itself(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    c.index_copy_(2, at, k + c[:, :, :1].sum(-1, keepdim=True))
    return c.exp()


KERNELS = [
    *(index_copied, indexed, counted_from_the_end, by_two_indices, read_before),
    *(written_alone, read_through_views, normalised, read_as_it_was_of_itself),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("f", KERNELS)
def test_taken(f: Function, dynamic: bool) -> None:
    record = compiled(f, cache(), torch.tensor([5, 15, 2]), new(3), dynamic=dynamic)
    assert sites(record) == 1
    assert not [s for s in steps(record) if isinstance(s, AtenStep) and "index" in s.target]
    assert not [s for s in steps(record) if isinstance(s, AtenStep) and "copy_" in s.target]


@pytest.mark.parametrize("f", [index_copied, indexed])
def test_what_is_not_dense(f: Function) -> None:
    """The cache of one layer in a tensor of all: its copy is laid out anew."""

    def layer(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
        found: Tensor = f(c[:, 1], at, k)
        return found

    compiled(layer, cache(2, 4, *SHAPE[1:]), torch.tensor([3]), new())
    torch._dynamo.reset()
    ours, theirs = cache(2, 3, 16, 24), cache(2, 3, 16, 24)
    records: list[Compilation] = []
    found = compiler(records)(f)(ours[..., 8:16], torch.tensor([3]), new())
    torch.testing.assert_close(found, f(theirs[..., 8:16], torch.tensor([3]), new()))
    torch.testing.assert_close(ours, theirs)


def test_another_order_of_memory() -> None:
    """Its copy, which others read, lies in another."""
    given = cache(2, 16, 3, 8).transpose(1, 2)
    record = compiled(index_copied, given, torch.tensor([3]), new())
    (miss,) = [each for each in record.misses if each.pattern == "updates"]
    assert miss.reason == "it is not as the input is"


def test_bytes_are_those_of_what_is_written() -> None:
    record = compiled(written_alone, cache(2, 3, 4096, 8), torch.tensor([3]), new())
    (plan,) = record.plans.values()
    report = build_report([Part("inference", plan, {})], DEVICES["h100"])
    assert report.bytes_moved == 2 * new().nbytes + 8


def added(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    c.index_add_(2, at, k)
    return c.exp()


def put_and_added(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    c.index_put_((at % 2, at), k[0, 0, 0, 0], accumulate=True)
    return c.exp()


def scattered(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    c.scatter_(2, at.view(1, 1, -1, 1).expand_as(k), k)
    return c.exp()


def one_number(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    c[:, :, at] = 1.5
    return c.exp()


@pytest.mark.parametrize("f", [added, put_and_added, scattered, one_number])
def test_calls_write_in_place_too(f: Function) -> None:
    record = compiled(f, cache(), torch.tensor([1, 0, 2]), new(3))
    assert sites(record) == 1
    assert [s.target for s in steps(record) if isinstance(s, AtenStep)]


def read_behind(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    before = c + 0
    c.index_copy_(2, at, k)
    return (c - before) @ k[:, :, 0].unsqueeze(-1)


def handed_out(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    """The caller gets memory of its own."""
    made = c.index_copy(2, at, k)
    c.copy_(made)
    return made


def view_handed_out(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    made = c.index_copy(2, at, k)
    c.copy_(made)
    return made.transpose(1, 2)


def twice(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    c.index_copy_(2, at, k)
    c.index_copy_(2, at + 1, k)
    return c.exp()


def of_another(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    c.copy_((c * 2).index_copy(2, at, k))
    return c.exp()


def of_nothing(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    return c.index_copy(2, at, k).exp()


def widened(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    c.copy_(c.double().index_copy(2, at, k.double()))
    return c.exp()


def repeated(c: Tensor, at: Tensor, k: Tensor) -> Tensor:
    """What it was is read again after it was written."""
    made = c.index_copy(2, at, k)
    result = made.exp() - (c @ made.mT).sum(-1, keepdim=True)
    c.copy_(made)
    return result


@pytest.mark.parametrize(
    "f", [handed_out, view_handed_out, twice, of_another, of_nothing, widened, repeated]
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_declined(f: Function, dynamic: bool) -> None:
    record = compiled(f, cache(), torch.tensor([5, 2]), new(2), dynamic=dynamic)
    assert sites(record) == 0


def test_memory_of_the_callers_own() -> None:
    """A result that is what the cache became shares nothing with it."""
    c = cache()
    made = compiler([])(handed_out)(c, torch.tensor([5]), new())
    before = made.clone()
    c.zero_()
    torch.testing.assert_close(made, before, rtol=0, atol=0)


def test_aliased_inputs() -> None:
    def f(c: Tensor, same: Tensor, at: Tensor, k: Tensor) -> Tensor:
        c.index_copy_(2, at, k)
        return same.sum(-1)

    ours, theirs = cache(), cache()
    found = compiler([])(f)(ours, ours[:, 1:], torch.tensor([5]), new())
    torch.testing.assert_close(found, f(theirs, theirs[:, 1:], torch.tensor([5]), new()))
    torch.testing.assert_close(ours, theirs)


def test_what_was_read_before_is_read_before() -> None:
    compiled(read_behind, cache(), torch.tensor([5, 2]), new(2))


def test_places_that_are_not_there_are_left_alone() -> None:
    """Eager stops the program; on a GPU nothing may be written there."""
    memory = torch.randn(1024)
    before = memory.clone()
    c = memory[128 : 128 + 768].view(SHAPE)
    compiler([])(written_alone)(c, torch.tensor([16, -1, 2]), new(3))
    expected = before[128 : 128 + 768].view(SHAPE)
    expected[:, :, 2] = new(3)[:, :, 2]
    torch.testing.assert_close(memory, before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_dtypes(dtype: torch.dtype) -> None:
    given = (cache(dtype=dtype), torch.tensor([5, 2]), new(2, dtype=dtype))
    records: list[Compilation] = []
    ours, theirs = given[0].clone(), given[0].clone()
    found = compiler(records)(indexed)(ours, *given[1:])
    torch.testing.assert_close(found, indexed(theirs, *given[1:]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert sites(records[0]) == 1


def test_in_training() -> None:
    """The cache takes part in no gradient; what is written is read for one."""

    def f(c: Tensor, at: Tensor, x: Tensor) -> Tensor:
        c.index_copy_(2, at, x.detach() * 2)
        return (c * x).sum()

    x = new().requires_grad_()
    records: list[Compilation] = []
    compiler(records)(f)(cache(), torch.tensor([5]), x).backward()
    ours, x.grad = x.grad, None
    f(cache(), torch.tensor([5]), x).backward()
    torch.testing.assert_close(ours, x.grad)


def test_the_text_of_the_module_writes_there_too() -> None:
    """Emitted, and run by Triton's interpreter."""
    from iocompiler.codegen.module import emit_module
    from iocompiler.runtime.load import load_text
    from tests.runtime.plans import interpreter, on_a_gpu

    record = compiled(index_copied, cache(), torch.tensor([5, 15, 2]), new(3))
    plan: Plan = on_a_gpu(record.plans["inference"])
    run = load_text(emit_module(plan, "graph"), "graph", "cpu", interpreter(plan))
    ours, theirs = cache(), cache()
    at, k = torch.tensor([5, 15, 2]), new(3)
    (found,) = run([ours, k, at])
    torch.testing.assert_close(found, index_copied(theirs, at, k))
    torch.testing.assert_close(ours, theirs)
