"""``no_fallback``: what aten may write, and what is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import iocompiler as ioc
from iocompiler.errors import InvalidOption
from iocompiler.plan.data import Plan


def compiled(function: Callable[..., Any], allowed: int | None) -> Callable[..., Any]:
    backend = ioc.Compiler(engine="reference", no_fallback=allowed, cache=False)
    return torch.compile(function, backend=backend)


def test_a_large_call_of_aten_is_an_error_that_names_it() -> None:
    x = torch.randn(4, 6)

    def f(x: Tensor) -> Tensor:
        return (x + 1).logcumsumexp(0) * 2

    with pytest.raises(
        Exception, match=r"logcumsumexp = aten.logcumsumexp.default runs on aten"
    ) as e:
        compiled(f, 95)(x)
    assert "writes 96 bytes; no_fallback allows 95" in str(e.value)
    assert "test_no_fallback.py:27" in str(e.value)
    torch.testing.assert_close(compiled(f, 96)(x), f(x))


def test_what_a_library_does_best_is_no_fallback() -> None:
    x = torch.randn(4, 4)
    torch.testing.assert_close(compiled(lambda x: (x @ x).relu(), 0)(x), (x @ x).relu())


def test_a_view_writes_nothing() -> None:
    x = torch.randn(4, dtype=torch.complex64)
    run = compiled(lambda x: torch.view_as_real(x) * 2, 0)
    torch.testing.assert_close(run(x), torch.view_as_real(x) * 2)


def test_a_region_on_aten_is_an_error() -> None:
    def engine(plan: Plan, gm: GraphModule) -> Any:
        raise RuntimeError("no such engine")

    backend = ioc.Compiler(engine=engine, no_fallback=1 << 30)
    run = torch.compile(lambda x: x + 1, backend=backend)
    with pytest.raises(Exception, match="no_fallback: inference failed and would run on aten"):
        run(torch.eye(3))


def test_an_operator_with_effects_is_a_call_as_others() -> None:
    run = compiled(lambda x: torch.linalg.inv(x) + 1, 1 << 30)
    torch.testing.assert_close(run(2 * torch.eye(3)), 0.5 * torch.eye(3) + 1)


@pytest.mark.parametrize("value", [-1, 1.5, "1MB", True])
def test_other_values_are_errors(value: object) -> None:
    with pytest.raises(InvalidOption, match="no_fallback"):
        ioc.Compiler(no_fallback=value)
