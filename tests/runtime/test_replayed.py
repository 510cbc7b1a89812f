"""Operators' calls done again by what they launch; kernels here are Python's."""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from iocompiler.ops import library
from iocompiler.ops.attention import FORWARD
from iocompiler.runtime import replayed
from iocompiler.runtime.recording import recorder
from iocompiler.runtime.replayed import Replayed

WATCHED = 2
"""The call that is, and those after it are done again."""
TABLE = torch.full((4,), 5.0)


def launch(bound: Callable[..., None], *tensors: Tensor) -> None:
    """As `template_launch.Launch` launches on a GPU."""
    told = recorder()
    if told is not None:
        told.note(bound, (1, 1, 1), tensors)
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


def computes(a: Tensor, b: Tensor) -> Tensor:
    launch(add, a, b, made := torch.empty_like(a))
    return torch.addcmul(made, a.view(2, 2).t().reshape(4), b, value=0.5)


def writes(a: Tensor, b: Tensor) -> Tensor:
    out = one_result(a, b)
    out[1:3].copy_(a[2:])
    out[:1].zero_()
    torch.mul(out.view(2, 2)[1], 2.0, out=out[:2])
    return out


def several_of_a_call(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    values, places = torch.sort(a.view(2, 2), dim=1, descending=True)
    return values + TABLE[:2], places[0].clone()


def beside_numbers(a: Tensor, b: Tensor) -> Tensor:
    rows = a.view(1, 1, 2, 2)
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, rows, rows)
    return found[0] + found[1].unsqueeze(-1)


def parts_of_a_call(a: Tensor, b: Tensor) -> Tensor:
    first, second = torch.cat([a, b]).split(4)
    out = a.new_zeros(4)
    launch(add, first, second, out)
    return out.neg_()


def constants(a: Tensor, b: Tensor) -> Tensor:
    meta = torch.empty_like(a, device="meta")
    found = torch.where(a > float("-inf"), a.to(torch.float64), 0.25)
    return (found + meta.stride(0)).to(dtype=torch.float32, memory_format=torch.preserve_format)


def by_address(a: Tensor, b: Tensor) -> Tensor:
    """As a product of a library's: with less than it may be given."""
    out = torch.empty_like(a)
    told = recorder()
    if told is not None:
        told.note(doubled, (), (a, out, None))
    doubled(7, a.data_ptr(), out.data_ptr(), 0)
    return out


def doubled(stream: int, a: int, out: int, added: int) -> None:
    assert added == 0
    add(stream, 1, 1, 1, a, a, out)


REPLAYED = [
    one_result, through_memory_of_its_own, parts_of_one, what_is_kept_for_all, computes, writes,
    several_of_a_call, beside_numbers, parts_of_a_call, constants, by_address,
]  # fmt: skip
KEPT: list[Tensor] = []


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


def reads(a: Tensor, b: Tensor) -> Tensor:
    return one_result(a, b) if a[0].item() < 1e9 else a


def as_many_as_there_are(a: Tensor, b: Tensor) -> Tensor:
    return a.nonzero()


def turns_around(a: Tensor, b: Tensor) -> Tensor:
    both = torch.stack([a, b])
    return both.t_() + 0


def shows_other_elements(a: Tensor, b: Tensor) -> Tensor:
    return a.view(torch.int32) + 1


def makes_room(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.add(a, b, out=out)
    return out


def keeps_what_it_makes(a: Tensor, b: Tensor) -> Tensor:
    KEPT.append(a + b)
    return KEPT[-1] * 2


def returns_what_it_is_given(a: Tensor, b: Tensor) -> Tensor:
    launch(add, a, b, torch.empty_like(a))
    return a


def returns_what_is_kept(a: Tensor, b: Tensor) -> Tensor:
    return TABLE


def runs_in_the_interpreter(a: Tensor, b: Tensor) -> Tensor:
    told = recorder()
    if told is not None:
        told.unseen()
    return torch.empty_like(a)


@pytest.mark.parametrize(
    "body",
    [reads, as_many_as_there_are, turns_around, shows_other_elements, makes_room,
     returns_what_it_is_given, returns_what_is_kept, keeps_what_it_makes, runs_in_the_interpreter],
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


def test_nothing_is_a_tensor_like_another() -> None:
    operator = Operator(lambda a, b: (one_result(a, a.clone()), b.view(0, 1), torch.cat([b, a])))
    for _ in range(5):
        a, b = numbers(), numbers(0)
        first, second, third = operator.run(a, b)
        assert torch.equal(first, a + a)
        assert torch.equal(third, a)
        assert second.shape == (0, 1)
    assert operator.ran == WATCHED


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
    monkeypatch.setattr(replayed, "Watch", None)  # would fail
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


def test_memory_dies_where_it_dies_in_the_operator() -> None:
    """Watched or done again."""
    made: list[weakref.ref[Tensor]] = []

    def empty(*size_stride_dtype: Any) -> Tensor:
        found: Tensor = torch._C._dynamo.guards._empty_strided_cpu(*size_stride_dtype)  # type: ignore[attr-defined]
        made.append(weakref.ref(found))
        return found

    def body(a: Tensor, b: Tensor) -> Tensor:
        for _ in range(3):
            scratch = torch.empty_like(a)
            made.append(weakref.ref(scratch))
            launch(noted, a, b, scratch)
            a = scratch + 1
            del scratch
        return a

    def noted(*arguments: int) -> None:
        alive.append(sum(each() is not None for each in made))
        add(*arguments)

    operator = Operator(body)
    operator.again = Replayed(operator, empty)
    for _ in range(4):
        alive: list[int] = []
        a, b = numbers(), numbers()
        assert torch.equal(operator.run(a, b), a + b + 1 + b + 1 + b + 1)
        assert alive == [1, 1, 1]
    assert operator.ran == WATCHED


def heads() -> tuple[Any, ...]:
    return torch.randn(12, 8), torch.randn(33, 8), torch.randn(33), torch.randint(0, 33, (12,))


def queries(kernel: str) -> tuple[Any, ...]:
    q, k, v = (torch.randn(2, 5, 4, 8).transpose(1, 2) for _ in "qkv")
    return q, k, v, None, 0.3, True, 0.0, kernel, "ssss"


def saved(kernel: str) -> tuple[Any, ...]:
    given = queries(kernel)
    grad = torch.randn_like(given[0])
    return grad, *given[:4], *FORWARD(*given), *given[4:], False


OPERATORS: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "losses": (
        "linear_cross_entropy_losses",
        lambda: (*heads(), None, None, -100, 0.1, 1.0, 1.0, False, True),
    ),
    "gradients": (
        "linear_cross_entropy_gradients",
        lambda: (
            *heads(),
            torch.rand(12),
            None,
            -100,
            0.0,
            30.0,
            1 / 30,
            True,
            False,
            True,
            True,
            True,
        ),
    ),
    "forward by blocks": ("attention_forward", lambda: queries("blockwise")),
    "attention": ("attention_backward", lambda: saved("cpu")),
    "blocks": ("attention_backward", lambda: saved("blockwise")),
    "embeddings": (
        "embedding_gradient",
        lambda: (torch.randn(12, 8), torch.randint(0, 33, (12,)), 33, -1),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_of_ours(name: str) -> None:
    """As they run on a CPU: mostly by torch's."""
    target, given = OPERATORS[name]
    run = library.function(target)
    operator = Operator(run)
    for _ in range(4):
        args = given()
        found, expected = listed(operator.run(*args)), listed(run(*args))
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
            assert mine.stride() == theirs.stride()
    assert operator.ran == WATCHED
