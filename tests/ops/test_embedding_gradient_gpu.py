"""The gradient of an embedding table on a GPU, against float64 and aten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.cost_model.device import current_device
from iocompiler.cost_model.embedding import by_counting
from iocompiler.ops.embedding_gradient import GRADIENT, INTO, ONTO
from iocompiler.plan.data import AtenStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS, MANY = 5003, 50000
"""More tokens than are put in order by counting."""


def _random(count: int, rows: int) -> Tensor:
    return torch.randint(0, rows, (count,), device="cuda")


def _half(count: int, rows: int) -> Tensor:
    return torch.where(torch.rand(count, device="cuda") < 0.5, 1, _random(count, rows))


PATTERNS: dict[str, Callable[[int, int], Tensor]] = {
    "random": _random,
    "half equal": _half,
    "all equal": lambda count, rows: torch.full((count,), rows - 1, device="cuda"),
    "few rows": lambda count, rows: _random(count, 9),
    "in order": lambda count, rows: torch.arange(count, device="cuda") // 3 % rows,
}


def sums(base: Tensor, grad: Tensor, indices: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """In float64, and the same of absolute values."""
    kept = (indices >= 0) & (indices < base.shape[0]) & (indices != padding)
    rows, given = indices[kept].long(), grad[kept].double()
    return (
        base.double().index_add(0, rows, given),
        base.double().abs().index_add(0, rows, given.abs()),
    )


def assert_rounded_once(found: Tensor, exact: Tensor, size: Tensor) -> None:
    """Within half a place, and what a float32 sum is off."""
    half = torch.finfo(found.dtype).eps / 2
    smallest = torch.finfo(found.dtype).smallest_normal
    allowed = exact.abs() * half + size * 4e-6 + smallest
    assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 16, 100, 3333, 8192, MANY])
def test_values_and_repetitions(pattern: str, dtype: torch.dtype, count: int) -> None:
    indices = PATTERNS[pattern](count, ROWS)
    grad = torch.randn(count, 320, device="cuda").to(dtype) / 8
    base = torch.randn(ROWS, 320, device="cuda").to(dtype)
    for padding in (-1, 1):
        nothing = torch.zeros_like(base)
        found = GRADIENT(grad, indices, ROWS, padding)
        assert_rounded_once(found, *sums(nothing, grad, indices, padding))
        onto = ONTO(base, grad, indices, padding)
        assert_rounded_once(onto, *sums(base, grad, indices, padding))
        into = base.clone()
        INTO(into, grad, indices, padding)
        assert torch.equal(into, onto)
        for _ in range(3):
            assert torch.equal(GRADIENT(grad, indices, ROWS, padding), found)


def test_both_ways_to_an_order() -> None:
    row = current_device(torch.device("cuda"))
    assert by_counting(8192, row)
    assert not by_counting(MANY, row)


@pytest.mark.parametrize(("rows", "width"), [(30522, 1024), (50257, 768), (128256, 2048)])
def test_no_worse_than_aten_at_real_sizes(rows: int, width: int) -> None:
    indices = _half(8192, rows)
    grad = torch.randn(8192, width, device="cuda", dtype=torch.bfloat16)
    exact, _ = sums(torch.zeros(rows, width, device="cuda"), grad, indices, -1)
    ours = GRADIENT(grad, indices, rows, -1).double() - exact
    theirs = torch.ops.aten.embedding_dense_backward(grad, indices, rows, -1, False) - exact
    assert ours.norm() <= 1.01 * theirs.norm()


@pytest.mark.parametrize("width", [1, 7, 64, 130, 1000])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_odd_widths_and_strides(width: int, index: torch.dtype) -> None:
    indices = _half(777, ROWS).to(index).view(7, 111)
    wide = torch.randn(7, 111, width + 3, device="cuda", dtype=torch.bfloat16)
    across = torch.randn(width, 777, device="cuda").bfloat16().t().view(7, 111, width)
    one = torch.randn(width, device="cuda").bfloat16().expand(7, 111, width)
    nothing = torch.zeros(ROWS, width, device="cuda")
    for grad in (wide[..., :width], wide[..., 3:], across, one):
        found = GRADIENT(grad, indices, ROWS, -1)
        flat = grad.reshape(-1, width)
        assert_rounded_once(found, *sums(nothing, flat, indices.flatten(), -1))


@pytest.mark.parametrize("count", [500, MANY])
def test_indices_outside_touch_nothing(count: int) -> None:
    memory = torch.zeros(3 * ROWS, 64, device="cuda", dtype=torch.bfloat16)
    indices = torch.randint(-(2**40), 2**40, (count,), device="cuda")
    indices[::3] = torch.randint(-ROWS, 2 * ROWS, (len(indices[::3]),), device="cuda")
    grad = torch.randn(count, 64, device="cuda", dtype=torch.bfloat16)
    table = memory[ROWS : 2 * ROWS]
    exact = sums(table, grad, indices, -1)
    INTO(table, grad, indices, -1)
    assert_rounded_once(table, *exact)
    assert not memory[:ROWS].any()
    assert not memory[2 * ROWS :].any()


def test_nothing() -> None:
    none = torch.empty(0, device="cuda", dtype=torch.int64)
    assert not GRADIENT(torch.empty(0, 8, device="cuda"), none, 5, -1).any()
    indices = torch.zeros(3, device="cuda", dtype=torch.int64)
    assert GRADIENT(torch.empty(3, 0, device="cuda"), indices, 5, -1).shape == (5, 0)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("count", [4000, MANY])
def test_the_host_waits_for_nothing_and_a_graph_replays(count: int) -> None:
    grad = torch.randn(count, 256, device="cuda", dtype=torch.bfloat16)
    indices, table = _random(count, ROWS), torch.zeros(ROWS, 256, device="cuda").bfloat16()
    GRADIENT(grad, indices, ROWS, -1)
    INTO(table.clone(), grad, indices, -1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        GRADIENT(grad, indices, ROWS, -1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = GRADIENT(grad, indices, ROWS, -1)
        INTO(table, grad, indices, -1)
    for pattern in PATTERNS.values():
        indices.copy_(pattern(count, ROWS))
        table.zero_()
        graph.replay()
        exact = sums(torch.zeros_like(table), grad, indices, -1)
        assert_rounded_once(found, *exact)
        assert torch.equal(table, found)


class Tied(nn.Module):
    """A table, a layer, a head tied to the table, a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(ROWS, 128), nn.Linear(128, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        logits = F.linear(x + self.layer(x).tanh(), self.table.weight)
        return F.cross_entropy(logits.float(), tokens.flip(0))


def _step(run: Any, model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    run(tokens).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_training_a_tied_model(mode: str, dynamic: bool) -> None:
    records: list[Compilation] = []
    model = Tied().cuda().bfloat16()
    wide = Tied().cuda().double()
    wide.load_state_dict(model.state_dict())
    backend = Compiler(mode=mode, cache=False, on_compiled=records.append)
    run = torch.compile(model, backend=backend, dynamic=dynamic)
    lengths = (700, 100, 20000, 700) if dynamic else (700, 700, 700)
    for length in lengths:
        tokens = _half(length, ROWS)
        ours, theirs = _step(run, model, tokens), _step(model, model, tokens)
        exact = _step(wide, wide, tokens)
        for name, wanted in exact.items():
            error, eager = (
                (each[name].double() - wanted).norm() / wanted.norm() for each in (ours, theirs)
            )
            assert error <= 3 * eager + 1e-5, (name, length)
    assert len(records) <= 2
    calls = [s.target for s in records[0].plans["backward"].steps if isinstance(s, AtenStep)]
    assert "iocompiler.embedding_gradient_.default" in calls
    assert "aten.embedding_dense_backward.default" not in calls
    assert dynamic or not records[0].fallbacks
