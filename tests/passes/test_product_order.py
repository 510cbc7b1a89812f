"""Chains of products: made in another order only where that is exact, whole, and cheaper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.accuracy import relative_error
from tests.compiling import compiled, grad

Case = tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]


def _heads() -> tuple[Tensor, ...]:
    return tuple(grad(2, 3, 200, 8) for _ in range(3))


TAKEN: dict[str, Case] = {
    "attention without a softmax": (
        lambda q, k, v: (q @ k.transpose(-2, -1) * 0.125) @ v, _heads),
    "the same, scaled twice": (
        lambda q, k, v: torch.matmul((q @ k.mT * 3 / 7).mul(-0.5), v), _heads),
    "a narrow end": (
        lambda x, a, b: F.linear(F.linear(x, a), b),
        lambda: (grad(30, 7, 16), grad(512, 16), grad(4, 512))),
    "four matrices": (
        lambda a, b, c, d: ((a @ b) @ c) @ d,
        lambda: (grad(300, 4), grad(4, 301), grad(301, 4), grad(4, 90))),
    "a turned product": (
        lambda a, b, c: (a @ b).t() @ c, lambda: (grad(400, 3), grad(3, 500), grad(400, 2))),
    "a product as the weight": (
        lambda x, a, b: F.linear(x, a @ b), lambda: (grad(3, 600), grad(500, 2), grad(2, 600))),
    "a vector": (
        lambda a, b, v: (a @ b) @ v, lambda: (grad(300, 400), grad(400, 500), grad(500))),
    "a vector of the left": (
        lambda v, a, b: v @ (a @ b), lambda: (grad(300), grad(300, 400), grad(400, 500))),
    "mm, bmm, mv": (
        lambda a, b, v: torch.mv(torch.mm(a, b), v),
        lambda: (grad(300, 400), grad(400, 500), grad(500))),
    "one matrix for a batch": (
        lambda x, a, b: (x @ a) @ b, lambda: (grad(5, 100, 4), grad(4, 90), grad(90, 3))),
}  # fmt: skip


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).relu() @ v


def _read_again(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = q @ k.transpose(-2, -1)
    return s @ v, s


def _by_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * v[0, 0, 0, 0]) @ v


def _masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).tril() @ v


def _other_dims(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).transpose(0, 1) @ v[:1, :1]


def _rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).bfloat16() @ v.bfloat16()


def _under_no_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        s = q @ k.transpose(-2, -1)
    return s @ v


def _biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.linear(q, k[0, 0], k[0, 0, :, 0]) @ v


def _by_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0) @ v


def _a_vector_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.mv(q[0, 0], k[0, 0, 0]) @ v[0, 0]


def _as_it_is(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.transpose(-2, -1) @ v)


DECLINED = [
    _softmax, _read_again, _by_a_tensor, _masked, _other_dims, _rounded, _under_no_grad, _biased,
    _by_zero, _a_vector_inside, _as_it_is,
]  # fmt: skip


def _results(f: Callable[..., Any], given: tuple[Tensor, ...]) -> list[Tensor]:
    result = f(*given)
    first = result[0] if isinstance(result, tuple) else result
    torch.manual_seed(1)
    cotangent = torch.randn(first.shape, dtype=torch.float64).to(first.dtype)
    return [first, *torch.autograd.grad(first, given, cotangent, allow_unused=True)]


def _held(run: Callable[..., Any], f: Callable[..., Any], given: tuple[Tensor, ...]) -> None:
    wide = tuple(x.detach().double().requires_grad_() for x in given)
    rows = zip(_results(run, given), _results(f, given), _results(f, wide), strict=True)
    for place, (mine, theirs, exact) in enumerate(rows):
        assert (mine is None) == (theirs is None)
        if mine is None:
            continue
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert place or mine.stride() == theirs.stride()
        least = torch.finfo(mine.dtype).eps / 2
        allowed = (3 if place else 2) * max(relative_error(theirs, exact), least) + 1e-5
        assert relative_error(mine, exact) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TAKEN)
def test_is_taken_and_as_accurate_as_eager(name: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    f, make = TAKEN[name]
    given = tuple(x.detach().to(dtype).requires_grad_() for x in make())
    run, records = compiled(f)
    _held(run, f, given)
    (found,) = records[0].rewrites
    assert found.pattern == "product_order"
    assert found.where.startswith("test_product_order.py:")
    after, before = found.variant.split(" us for ")
    assert float(after) < float(before)


@pytest.mark.parametrize("f", DECLINED, ids=lambda f: f.__name__.strip("_"))
def test_is_declined(f: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    given = _heads()
    run, records = compiled(f)
    _held(run, f, given)
    assert not any(each.pattern == "product_order" for each in records[0].rewrites)


def test_float16_may_overflow() -> None:
    torch._dynamo.reset()
    f, _ = TAKEN["attention without a softmax"]
    run, records = compiled(f)
    run(*(x.half() for x in _heads()))
    (miss,) = records[0].misses
    assert miss.pattern == "product_order"
    assert "may overflow" in miss.reason


def test_what_is_written_in_between_is_read_before() -> None:
    torch._dynamo.reset()

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.transpose(-2, -1)
        k.mul_(2)
        return s @ v

    ours, theirs = ([x.detach() for x in _heads()] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        mine.copy_(other)
    run, _ = compiled(f)
    torch.testing.assert_close(run(*ours), f(*theirs))


def test_another_length_is_the_same_graph() -> None:
    torch._dynamo.reset()
    f, _ = TAKEN["attention without a softmax"]
    run, records = compiled(f, dynamic=True)
    for length in (200, 150, 333):
        _held(run, f, tuple(grad(2, 3, length, 8) for _ in range(3)))
    assert [each.pattern for each in records[0].rewrites] == ["product_order"]
    assert len(records) == 1
