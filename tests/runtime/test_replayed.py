"""Operators' calls done again by what they launch; kernels here are Python's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from iocompiler.runtime import replayed, template_launch
from iocompiler.runtime.replayed import Replayed

WATCHED = 2
"""The call that is, and those after it are done again."""
TABLE = torch.full((4,), 5.0)


def launch(bound: Callable[..., None], *tensors: Tensor) -> None:
    """As `template_launch.Launch` launches on a GPU."""
    recorder = template_launch._recorder.get()
    if recorder is not None:
        recorder[0](bound, 1, tensors)
    bound(7, 1, 1, 1, *(x.data_ptr() for x in tensors))


def add(stream: int, gx: int, gy: int, gz: int, a: int, b: int, out: int) -> None:
    """out[i] = a[i] + b[i] for four numbers."""
    assert (stream, gx, gy, gz) == (7, 1, 1, 1)
    left, right, result = ((ctypes.c_float * 4).from_address(each) for each in (a, b, out))
    for place in range(4):
        result[place] = left[place] + right[place]


class Operator:
    """An operator of which ``body`` is the function; how often it ran."""

    def __init__(self, body: Callable[..., Any]):
        self.body, self.ran = body, 0
        self.again = Replayed(self, torch._C._dynamo.guards._empty_strided_cpu)  # type: ignore[attr-defined]

    def __call__(self, *args: Any) -> Any:
        self.ran += 1
        return self.body(*args)

    def run(self, *args: Any, sizes: tuple[int, ...] = ()) -> Any:
        return self.again(7, sizes, *args)


def numbers(count: int = 4) -> Tensor:
    return torch.randn(count)


def one_result(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty_like(a)
    launch(add, a, b, out)
    return out


def through_memory_of_its_own(a: Tensor, b: Tensor) -> Tensor:
    kept, out = a.new_empty((2, 4)), a.new_empty_strided((4,), (1,))
    launch(add, a, b, kept[1])
    launch(add, kept[1], a, out)
    return out


def parts_of_one(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    both = a.new_empty((4, 2))
    rows = both.as_strided((4,), (1,), 0), both.view(2, 4)[1]
    launch(add, a, b, rows[0])
    launch(add, rows[0], b, rows[1])
    return rows[1], None, rows[0]


def what_is_kept_for_all(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty((4,))
    launch(add, a, TABLE, out)
    return out


REPLAYED = [one_result, through_memory_of_its_own, parts_of_one, what_is_kept_for_all]


def listed(results: Any) -> list[Any]:
    return list(results) if isinstance(results, tuple) else [results]


@pytest.mark.parametrize("body", REPLAYED)
def test_is_done_again(body: Callable[..., Any]) -> None:
    operator = Operator(body)
    kept = []
    for call in range(1, 6):
        a, b = numbers(), numbers()
        found, expected = listed(operator.run(a, b)), listed(body(a, b))
        assert operator.ran == min(call, WATCHED)
        kept.append((found, expected))
    for found, expected in kept:  # each call has memory of its own
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine is None) == (theirs is None)
            if theirs is not None:
                assert torch.equal(mine, theirs)
                assert mine.stride() == theirs.stride()


def test_lists_of_tensors() -> None:
    operator = Operator(lambda a, rest, numbers, text: one_result(a, rest[0]))
    for _ in range(4):
        a, b = numbers(), numbers()
        assert torch.equal(operator.run(a, [b], [3], "text"), a + b)
    assert operator.ran == WATCHED


def computes(a: Tensor, b: Tensor) -> Tensor:
    return one_result(a * 1, b)


def reads(a: Tensor, b: Tensor) -> Tensor:
    return one_result(a, b) if a[0].item() < 1e9 else a


def writes(a: Tensor, b: Tensor) -> Tensor:
    out = one_result(a, b)
    out[0].copy_(a[0])
    return out


def returns_what_it_is_given(a: Tensor, b: Tensor) -> Tensor:
    launch(add, a, b, torch.empty_like(a))
    return a


def returns_what_is_kept(a: Tensor, b: Tensor) -> Tensor:
    return TABLE


def runs_in_the_interpreter(a: Tensor, b: Tensor) -> Tensor:
    recorder = template_launch._recorder.get()
    if recorder is not None:
        recorder[1]()
    return torch.empty_like(a)


@pytest.mark.parametrize(
    "body",
    [computes, reads, writes, returns_what_it_is_given, returns_what_is_kept,
     runs_in_the_interpreter],
)  # fmt: skip
def test_anything_else_stays_the_operators(body: Callable[..., Any]) -> None:
    operator = Operator(body)
    for call in range(1, 8):
        a, b = numbers(), numbers()
        operator.run(a, b)
        assert operator.ran == call


@pytest.mark.parametrize("same", [True, False])
def test_one_tensor_twice_may_be_two_another_time(same: bool) -> None:
    operator = Operator(one_result)
    for _ in range(4):
        a = numbers()
        operator.run(a, a if same else a.clone())
    a, b = numbers(), numbers()
    assert torch.equal(operator.run(a, b), a + b)
    assert operator.ran == (5 if same else WATCHED)


def test_nothing_has_no_address() -> None:
    operator = Operator(lambda a, b: a.new_empty(0))
    for _ in range(5):
        operator.run(numbers(), numbers(0))
    assert operator.ran == 5


def test_what_the_first_calls_make_for_all() -> None:
    tables: list[Tensor] = []

    def body(a: Tensor, b: Tensor) -> Tensor:
        if len(tables) < 2:
            tables.append(a * 0 + 1)
        return one_result(a, tables[-1])

    operator = Operator(body)
    for _ in range(6):
        a = numbers()
        assert torch.equal(operator.run(a, numbers()), a + 1)
    assert operator.ran == 3


def test_sizes_and_alignment_are_forms() -> None:
    operator = Operator(one_result)
    flat = numbers(64)
    forms = [((4,), 0), ((5,), 0), ((4,), 1), ((4,), 2)]
    for turn in range(1, 5):
        for size, offset in forms:
            a, b = flat[offset : offset + 4], numbers()
            assert torch.equal(operator.run(a, b, sizes=size), a + b)
        assert operator.ran == len(forms) * min(turn, WATCHED)


def test_what_comes_once_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed, "_MOST_FORMS", 8)
    monkeypatch.setattr(replayed, "_Watch", None)  # would fail
    operator = Operator(one_result)
    for length in range(20):
        operator.run(numbers(), numbers(), sizes=(length,))
    assert operator.ran == 20
    assert len(operator.again._seen) <= 8


def test_what_is_kept_lives_as_long_as_its_address_is_used() -> None:
    def body(a: Tensor, b: Tensor) -> Tensor:
        return one_result(a, tables[0])

    tables = [torch.full((4,), 3.0)]
    operator = Operator(body)
    a = numbers()
    for _ in range(WATCHED):
        operator.run(a, numbers())
    tables.clear()
    noise = [torch.full((4,), 9.0) for _ in range(50)]
    assert torch.equal(operator.run(a, numbers()), a + 3)
    assert len(noise) == 50


def test_the_switch_of_float32_is_part_of_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    switch = [False]
    monkeypatch.setattr(replayed, "products_rounded", lambda: switch[0])
    operator = Operator(one_result)
    for allowed in (False, True, False, True):
        switch[0] = allowed
        operator.run(numbers(), numbers())
    assert operator.ran == 4
    operator.run(numbers(), numbers())
    assert operator.ran == 4
