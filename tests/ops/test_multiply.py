"""Products inside of operators: which they are, and that the algorithms in force make them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from iocompiler.codegen.module import emit_module
from iocompiler.ops import sum_of_products
from iocompiler.ops.library_product import Problem
from iocompiler.ops.multiply import multiply, noted, using
from iocompiler.plan.data import AtenStep, Plan, Ref
from iocompiler.runtime import products
from iocompiler.runtime.ahead import multiplied
from iocompiler.runtime.load import load_text
from tests.accuracy import assert_near_exact
from tests.runtime.algorithms import (
    BF16,
    CPU,
    FIRST,
    SECOND,
    asked_of,
    half,
    lce,
    on_a_gpu_s_memory,
)
from tests.runtime.plans import interpreter, plan


@pytest.mark.parametrize("bias", [False, True])
def test_the_products_of_a_head_and_its_loss(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of a chunk; of the weight's gradient the first is written, others are added."""
    chunks = "iocompiler.ops.linear_cross_entropy_chunks.SCRATCH_BYTES"
    monkeypatch.setattr(chunks, 2 * 256 * 256)
    found = multiplied(lce(512, 256, 64, bias), CPU, {})
    project = Problem(
        1, 256, 256, 64, BF16, (0, 64, 1), (0, 1, 64), (0, 256, 1), (0, 0, 1) if bias else None
    )
    of_x = Problem(1, 256, 64, 256, BF16, (0, 256, 1), (0, 64, 1), (0, 64, 1))
    of_weight = Problem(1, 256, 64, 256, BF16, (0, 1, 256), (0, 64, 1), (0, 64, 1))
    added = replace(of_weight, added=(0, 64, 1))
    assert found == [project, of_x, of_weight, project, of_x, added]
    assert all(products.supported(problem) for problem in found)


def summed() -> Plan:
    args = ([Ref("a"), Ref("a")], [Ref("b"), Ref("b")])
    step = AtenStep(str(sum_of_products.SUM_OF_PRODUCTS), args, (), (("y", half(64, 48)),), False)
    return plan({"a": half(64, 32), "b": half(32, 48)}, [step], (Ref("y"),))


def test_a_sum_of_products_notes_each() -> None:
    first = Problem(1, 64, 48, 32, BF16, (0, 32, 1), (0, 48, 1), (0, 48, 1))
    assert multiplied(summed(), CPU, {}) == [first, replace(first, added=(0, 48, 1))]


@pytest.mark.parametrize("measured", [0, 1, 2])
def test_a_module_passes_them_on(measured: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it has; others are aten's. On the CPU by the library's stand-in."""
    inside = multiplied(summed(), CPU, {})
    algorithms = tuple((problem, SECOND) for problem in inside[:measured])
    text = emit_module(replace(summed(), algorithms=algorithms), "graph")
    assert ("module.algorithms({" in text) == (measured > 0)
    assert ('module.multiplying(function("sum_of_products"))' in text) == (measured > 0)
    run = load_text(text, "graph", "cpu", interpreter(summed()))
    asked = asked_of(monkeypatch)
    on_a_gpu_s_memory(monkeypatch)
    a, b = torch.randn(64, 32).to(BF16), torch.randn(32, 48).to(BF16)
    (found,) = run([a, b])
    assert asked == dict(algorithms)
    assert_near_exact([found], [a @ b * 2], [a.double() @ b.double() * 2], BF16)


@pytest.mark.parametrize("form", ["plain", "bias", "add"])
def test_multiply_is_aten_s(form: str) -> None:
    a, b, bias, out = (torch.randn(*shape) for shape in ((5, 4), (4, 8), (8,), (5, 8)))
    given: dict[str, Any] = {"bias": bias} if form == "bias" else {"add": form == "add"}
    added = {"plain": 0.0, "bias": bias, "add": out.clone()}[form]
    seen: list[Problem] = []
    with noted(seen.append), using({}):
        multiply(a, b, out, **given)
    torch.testing.assert_close(out, a @ b + added)
    (problem,) = seen
    assert problem.added == {"plain": None, "bias": (0, 0, 1), "add": (0, 8, 1)}[form]
    multiply(a, b, out)
    assert len(seen) == 1


@pytest.mark.parametrize("form", ["plain", "bias", "add"])
def test_multiply_passes_addresses(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library's stand-in on the CPU: aten on the same addresses."""
    on_a_gpu_s_memory(monkeypatch)
    a, b, bias = (torch.randn(*s).to(BF16) for s in ((5, 16), (8, 16), (8,)))
    out = torch.randn(5, 8).to(BF16)
    given: dict[str, Any] = {"bias": bias} if form == "bias" else {"add": form == "add"}
    before = out.clone()
    seen: list[Problem] = []
    with noted(seen.append):
        multiply(a, b.t(), out.clone(), **given)
    asked = asked_of(monkeypatch)
    with using({seen[0]: SECOND}):
        multiply(a, b.t(), out, **given)
    assert asked == {seen[0]: SECOND}

    def wanted(dtype: torch.dtype) -> Tensor:
        added = {"plain": torch.zeros(8), "bias": bias, "add": before}[form].to(dtype)
        return torch.addmm(added, a.to(dtype), b.t().to(dtype))

    assert_near_exact([out], [wanted(BF16)], [wanted(torch.float64)], BF16)


def test_other_products_are_aten_s() -> None:
    """Of two dtypes; with a bias that has gaps; of lines that begin amid a vector, with a bias."""
    seen: list[Problem] = []
    wide, half_of = torch.empty(5, 3), torch.empty(5, 3, dtype=BF16)
    rows, columns = torch.ones(5, 4), torch.ones(4, 3)
    bias = torch.randn(6)
    with noted(seen.append), using({}):
        with pytest.raises(RuntimeError, match="dtype"):
            multiply(rows, columns, half_of)
        multiply(rows, columns, wide, bias=bias[::2])
        torch.testing.assert_close(wide, 4.0 + bias[::2].expand(5, 3))
        multiply(rows, columns, wide, bias=bias[:3])
        torch.testing.assert_close(wide, 4.0 + bias[:3].expand(5, 3))
    assert not seen
    with noted(seen.append):
        multiply(rows, columns, wide)
    with using({seen[0]: FIRST}):  # on the CPU
        multiply(rows, columns, wide)
    torch.testing.assert_close(wide, torch.full((5, 3), 4.0))
