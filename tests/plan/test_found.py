"""Sizes and numbers found while the graph runs: kernels wait for them and use them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from iocompiler.backend import Compiler
from iocompiler.codegen.module import emit_module
from iocompiler.compilation import Compilation
from iocompiler.errors import FallbackWarning
from tests.runtime.text_engine import TextEngine


@pytest.fixture(autouse=True)
def found_sizes_in_graphs() -> Iterator[None]:
    settings = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}
    with torch._dynamo.config.patch(settings):
        yield


def _expert(x: Tensor) -> Tensor:
    rows = torch.where(x[:, 0] > 0)[0]
    return torch.zeros_like(x).index_add(0, rows, x[rows].sin())


def _rows(x: Tensor) -> Tensor:
    return x[(x[:, 0] > 0).nonzero().squeeze(1)]


_SQUARE = torch.randn(6, 6)
KEPT_ROWS = [(torch.randn(n, 6),) for n in (3, 4, 9)] + [(-torch.rand(4, 6),)]
TABLES = [(torch.randn(n, m),) for n, m in ((3, 6), (4, 8), (5, 9))]
KEPT = [*TABLES, (-torch.rand(4, 8),), (torch.rand(5, 5),)]  # none kept, all kept
COUNTED = [(table, torch.tensor(n)) for n, (table,) in zip((2, 3, 5), TABLES, strict=True)]
REPEATED = [(table, torch.arange(len(table))) for (table,) in TABLES]
CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[Tensor, ...]]]] = {
    "what a mask keeps": (lambda x: x[x > 0] * 2, KEPT),
    "its sum": (lambda x: x[x > 0].exp().sum(), KEPT),
    "places": (lambda x: torch.nonzero(x > 0) * 2, KEPT),
    "rows of an expert": (_expert, KEPT),
    "a number": (lambda x, n: x * n.item() + 1, COUNTED),
    "a number as a size": (lambda x, n: torch.ones(n.item(), device=x.device).sum() + x, COUNTED),
    "rows through a softmax": (lambda x: (_rows(x) @ _SQUARE).softmax(-1).square(), KEPT_ROWS),
    "rows concatenated": (lambda x: torch.cat([_rows(x), _rows(x) * 2]).sin(), KEPT_ROWS),
    "rows as one of a batch": (
        lambda x: torch.bmm(_rows(x)[None], _SQUARE[None] * x[0, 0]),
        KEPT_ROWS,
    ),
    "rows repeated": (lambda x, n: x.repeat_interleave(n, 0).sin(), REPEATED),
}


def _compiled(function: Callable[..., Any], records: list[Compilation]) -> Callable[..., Any]:
    backend = Compiler(engine="reference", strict=True, on_compiled=records.append)
    return torch.compile(function, backend=backend, dynamic=True)


@pytest.mark.parametrize("name", CASES)
def test_is_what_eager_gives(name: str) -> None:
    function, draws = CASES[name]
    records: list[Compilation] = []
    run = _compiled(function, records)
    for draw in draws:
        ours, theirs = (
            [x.clone().requires_grad_(x.is_floating_point()) for x in draw] for _ in range(2)
        )
        result, expected = run(*ours), function(*theirs)
        torch.testing.assert_close(result, expected)
        if expected.requires_grad:
            result.sum().backward()
            expected.sum().backward()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    assert len(records) == 1


def test_the_module_reads_them_where_they_are_found() -> None:
    records: list[Compilation] = []
    _compiled(lambda x, n: torch.nonzero(x > 0) * n.item(), records)(*COUNTED[0])
    text = emit_module(records[0].plans["inference"], "found")
    assert "u0 = nonzero.shape[0]" in text
    (number,) = re.findall(r"(u\d+) = aten__local_scalar_dense\(", text)
    assert f"u0:i32:16 {number}:i64:16" in text  # an extent, and a number of any size


@pytest.mark.parametrize("engine", ["reference", TextEngine()], ids=["reference", "module"])
@pytest.mark.parametrize("number", [2.5, True, 7])
def test_numbers_are_returned_and_used(engine: Any, number: float) -> None:
    def f(x: Tensor, n: Tensor) -> tuple[Any, ...]:
        return n.item(), x + n.item(), torch.full((2,), n.item())

    run = torch.compile(f, backend=Compiler(engine=engine, strict=True, cache=False))
    for n in (torch.tensor(number), torch.tensor(number) * 0):
        x = torch.arange(3.0)
        ours, theirs = run(x, n), f(x, n)
        assert type(ours[0]) is type(theirs[0])
        torch.testing.assert_close(ours, theirs)


def test_a_slice_between_numbers_runs_on_aten() -> None:
    def f(x: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        return x.tensor_split(n)

    run = torch.compile(f, backend=Compiler(engine="reference", cache=False))
    x, n = torch.randn(5, 3), torch.tensor([1, 3])
    with pytest.warns(FallbackWarning, match="sizes that only a run finds"):
        torch.testing.assert_close(run(x, n), f(x, n))
