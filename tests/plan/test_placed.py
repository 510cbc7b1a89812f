"""A few places written by index in a tensor that stays as it was: one kernel with what reads it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from iocompiler.plan.data import AtenStep
from tests.plan.graphs import Planned

X, NEW = torch.randn(3, 16, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
AT = torch.tensor([5, 15])


def copied(x: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return x.index_copy(1, at, new).exp()


def put(x: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return torch.ops.aten.index_put(x, [None, at], new) * 2


def put_from_the_end(x: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return torch.ops.aten.index_put(x, [None, at - 16], new) * 2


def last_of_equal_ones(x: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return x.index_copy(1, at * 0 + 3, new).exp()


def rolled(x: Tensor, at: Tensor, new: Tensor) -> Tensor:
    """A window of keys that is full: all move by one, and one comes."""
    moved = x.roll(-1, 1)
    moved[:, at[:1] * 0 - 1] = new[:, :1]
    x.copy_(moved)
    return x.sum(-1)


def along_another(x: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return x.transpose(1, 2).index_copy(2, at, new.mT).exp()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "f", [copied, put, put_from_the_end, last_of_equal_ones, rolled, along_another]
)
def test_taken(f: Callable[..., Tensor], dynamic: bool) -> None:
    planned = Planned()
    run, at, new = planned(f, dynamic), AT.clone(), NEW
    if dynamic:
        torch._dynamo.mark_static(at)  # how many places there are
        new = NEW.clone()
        torch._dynamo.mark_static(new, 1)
    ours, theirs = X.clone(), X.clone()
    torch.testing.assert_close(run(ours, at, new), f(theirs, AT, NEW))
    torch.testing.assert_close(ours, theirs)
    (plan,) = planned.plans
    assert not [s for s in plan.steps if isinstance(s, AtenStep) and "index" in s.target]


def test_a_place_that_is_not_there_takes_nothing() -> None:
    def f(x: Tensor, at: Tensor, new: Tensor) -> Tensor:
        return torch.ops.aten.index_put(x, [None, at], new)

    made = Planned()(f)(X, torch.tensor([16, 2]), NEW)
    expected = X.clone()
    expected[:, 2] = NEW[:, 1]
    torch.testing.assert_close(made, expected)


def many(x: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return x.index_copy(1, torch.cat([at, at - 1]), torch.cat([new, new], 1)).exp()


def by_mask(x: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return torch.ops.aten.index_put(x, [x[:, 0, 0] > 9], new[:0, :1].expand(0, 16, 4)) * 2


def accumulated(x: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return torch.ops.aten.index_put(x, [None, at], new, True) * 2


def repeated(x: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return torch.ops.aten.index_put(x, [None, at], new[:1]) * 2


def by_two(x: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return torch.ops.aten.index_put(x, [at % 3, at], new[0]) * 2


def of_a_number(x: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return x.sum().index_copy(0, at[:1] * 0, new.sum()) * 2


def into_a_number(x: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return x.sum().exp().index_copy_(0, at[:1] * 0, new.sum()) * 2


@pytest.mark.parametrize(
    "f", [many, by_mask, accumulated, repeated, by_two, of_a_number, into_a_number]
)
def test_declined(f: Callable[..., Tensor]) -> None:
    planned = Planned()
    torch.testing.assert_close(planned(f)(X, AT, NEW), f(X, AT, NEW))
    (plan,) = planned.plans
    assert [s for s in plan.steps if isinstance(s, AtenStep) and "index" in s.target]
