"""Algorithms of products measured, kept and used on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.ops.library_product import Algorithm, Problem
from iocompiler.runtime import products
from iocompiler.runtime.tune_products import Selection
from tests.accuracy import assert_near_exact
from tests.runtime.algorithms import (
    BF16,
)


def mlp(x: Tensor, w: Tensor, c: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.linear(torch.tanh(torch.nn.functional.linear(x, w, c)), v)


def head(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w).float(), target)


PROGRAMS = {
    mlp: ((4096, 1024), (4096, 1024), (4096,), (1024, 4096)),
    head: ((4096, 1024), (32768, 1024)),
}


def step(f: Callable[..., Tensor], leaves: Sequence[Tensor], *rest: Tensor) -> list[Tensor]:
    result = f(*leaves, *rest)
    return [result, *torch.autograd.grad(result.float().square().mean(), leaves)]


def operands(f: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those with a gradient, and the others."""
    leaves = [
        torch.randn(s, device="cuda", dtype=BF16).div_(8).requires_grad_() for s in PROGRAMS[f]
    ]
    rest = [torch.randint(32768, (4096,), device="cuda")] if f is head else []
    return leaves, rest


def assert_right(found: list[Tensor], f: Any, leaves: list[Tensor], rest: list[Tensor]) -> None:
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = step(head_in_float64 if f is head else f, wide, *rest)
    assert_near_exact(found, step(f, leaves, *rest), exact, BF16)


def head_in_float64(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w), target)


@pytest.mark.gpu
@pytest.mark.parametrize("f", PROGRAMS)
def test_on_a_gpu(
    f: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Measured once, then found in the cache, in a plan file, and in the graph's modules; the same
    bits each time.
    """
    from iocompiler.runtime.measure_products import GpuProductBench

    leaves, rest = operands(f)
    path = tmp_path / "plan.json"

    def run(**options: Any) -> tuple[Compilation, list[Tensor]]:
        records: list[Compilation] = []
        torch._dynamo.reset()
        backend = Compiler(on_compiled=records.append, strict=True, mode="max-autotune", **options)
        found = step(torch.compile(f, backend=backend, dynamic=False), leaves, *rest)
        return records[0], found

    def forbidden(*_: Any) -> None:
        raise AssertionError("measured a second time")

    made = [run(plan=path)]
    monkeypatch.setattr(GpuProductBench, "time", forbidden)
    made += [run(cache=False), run(plan=path), run(), run()]
    selections = [
        [s for found in record.tuned.values() for s in found if isinstance(s, Selection)]
        for record, _ in made
    ]
    assert selections[0] == selections[1] == selections[3] != []
    assert selections[2] == []
    assert (made[3][0].cache, made[4][0].cache) == ("stored", "found")
    for each in selections[0]:
        assert len(each.seconds) > 1
        assert 1e-6 < min(each.seconds.values()) < 1e-2
        assert each.gain >= 1.0
    algorithms = [{n: p.algorithms for n, p in r.plans.items()} for r, _ in made[:4]]
    assert all(each == algorithms[0] for each in algorithms)
    for _, results in made[1:]:
        assert all(map(torch.equal, results, made[0][1]))
    assert_right(made[0][1], f, leaves, rest)


@pytest.mark.gpu
@pytest.mark.parametrize("f", PROGRAMS)
def test_the_last_proposed_on_a_gpu(
    f: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is measured: every product by another algorithm than the library's first."""
    from iocompiler.runtime.measure_products import GpuProductBench

    def last(self: Any, problem: Problem, algorithms: Sequence[Algorithm]) -> list[float]:
        return [1.0 / (1 + place) for place in range(len(algorithms))]

    monkeypatch.setattr(GpuProductBench, "time", last)
    used: list[Algorithm] = []
    queue = products._prepare

    def noted_queue(*given: Any) -> Any:
        used.extend(each for each in given if isinstance(each, Algorithm))
        return queue(*given)

    monkeypatch.setattr(products, "_prepare", noted_queue)
    records: list[Compilation] = []
    leaves, rest = operands(f)
    backend = Compiler(on_compiled=records.append, cache=False, strict=True, mode="max-autotune")
    found = step(torch.compile(f, backend=backend, dynamic=False), leaves, *rest)
    assert_right(found, f, leaves, rest)
    chosen = {a for p in records[0].plans.values() for _, a in p.algorithms}
    assert chosen == set(used)
    assert chosen
