"""What tells one function from another: its code and all it reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import iocompiler as ioc
from iocompiler.errors import NotCacheable
from iocompiler.runtime.identity import identity

FACTOR = [2.0]


def reads_a_global(x: Any) -> Any:
    return x * FACTOR[0]


def calls_it(x: Any) -> Any:
    return [reads_a_global(each) for each in x]


def closing_over(value: Any) -> Callable[..., Any]:
    return lambda x: x * value


@dataclass(frozen=True)
class Pass:
    name: str
    threshold: int

    def __call__(self, gm: Any) -> int:
        return self.threshold


@ioc.rewrite(lambda x: torch.ops.aten.relu.default(x), where=lambda m: len(m) > 1)
def one(x: Any) -> Any:
    return x


@ioc.rewrite(lambda x: torch.ops.aten.relu.default(x), where=lambda m: len(m) > 2)
def two(x: Any) -> Any:
    return x


def test_equal_things_are_equal() -> None:
    assert identity(closing_over(1)) == identity(closing_over(1))
    assert identity(Pass("p", 1)) == identity(Pass("p", 1))
    assert [identity(each) for each in ioc.DEFAULT] == [identity(each) for each in ioc.DEFAULT]


def test_what_a_function_reads_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(reads_a_global), identity(calls_it)
    monkeypatch.setitem(globals(), "FACTOR", [3.0])
    assert identity(reads_a_global) != before[0]
    assert identity(calls_it) != before[1]
    assert identity(closing_over(1)) != identity(closing_over(2))
    assert identity(closing_over(one)) != identity(closing_over(two))


def test_fields_and_arguments() -> None:
    assert identity(Pass("p", 1)) != identity(Pass("p", 2))
    assert identity(one) != identity(two)
    partial = functools.partial
    assert identity(partial(calls_it, 1)) != identity(partial(calls_it, 2))


def test_passes_differ() -> None:
    assert len({identity(each) for each in ioc.DEFAULT}) == len(ioc.DEFAULT)


def test_what_cannot_be_told_is_refused() -> None:
    space: dict[str, Any] = {}
    exec("def made(gm):\n    return 0\n", space)
    with pytest.raises(NotCacheable, match="the source of made"):
        identity(space["made"])
    with pytest.raises(NotCacheable, match="a Tensor"):
        identity(closing_over(torch.randn(3)))
