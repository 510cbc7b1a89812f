"""Products of few terms and of vectors: no contractions, and where they can, nothing in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.ops import target
from iocompiler.plan.contents import made
from iocompiler.plan.data import AtenStep
from iocompiler.tile.index import product
from tests.accuracy import compare_with_eager


class Rotary(nn.Module):
    """Angles as a rotary embedding has them, by a product of any spelling."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.spelling = spelling
        self.frequencies = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device).to(x.dtype)
        f = self.frequencies
        angles = {
            "matmul": lambda: (f[None, :, None] @ places[None, None, :]).transpose(1, 2),
            "mm": lambda: places[:, None].mm(f[None, :]),
            "einsum": lambda: torch.einsum("i,j->ij", places, f),
            "outer": lambda: torch.outer(places, f),
        }[self.spelling]()
        return torch.cat([x * angles.cos(), x * angles.sin()], -1)


@pytest.mark.parametrize(
    ("spelling", "dtype", "dynamic"),
    [
        ("matmul", torch.float32, False),
        ("matmul", torch.bfloat16, True),
        ("mm", torch.float32, False),
        ("einsum", torch.float32, False),
        ("outer", torch.float32, False),
    ],
)
def test_the_angles_are_computed_where_they_are_read(
    spelling: str, dtype: torch.dtype, dynamic: bool
) -> None:
    records: list[Compilation] = []

    def compiled(module: nn.Module) -> Any:
        backend = Compiler(engine="reference", strict=True, on_compiled=records.append)
        return torch.compile(module, backend=backend, dynamic=dynamic)

    given = {"x": torch.randn(3, 7, 4, requires_grad=True)}
    for each in compare_with_eager(
        lambda: Rotary(spelling), given, compiled, dtype=dtype, device="cpu", train=True
    ):
        assert each.ok, each
    steps = records[0].plans["forward"].steps
    assert not [step.target for step in steps if isinstance(step, AtenStep)]
    stored = [spec for step in steps for spec in made(step).values()]
    assert not [spec for spec in stored if product(spec.shape) == 7 * 4]


def test_what_is_not_finite_and_what_is_empty() -> None:
    a = torch.tensor([1.0, torch.inf, torch.nan, 0.0])[:, None]
    b = torch.tensor([[0.0, -torch.inf, 2.0]])
    run = torch.compile(torch.mm, backend=Compiler(engine="reference", strict=True))
    torch.testing.assert_close(run(a, b), a.mm(b), equal_nan=True)
    empty = torch.zeros(4, 0, 1), torch.zeros(4, 1, 3)
    assert run(*(t[0] for t in empty)).shape == (0, 3)


def test_a_sum_stays_a_contraction() -> None:
    records: list[Compilation] = []
    backend = Compiler(engine="reference", strict=True, on_compiled=records.append)
    a, b = torch.randn(4, 2), torch.randn(2, 3)
    torch.testing.assert_close(torch.compile(torch.mm, backend=backend)(a, b), a @ b)
    assert [step.target for step in records[0].plans["inference"].steps] == ["aten.mm.default"]  # type: ignore[union-attr]


@pytest.mark.parametrize("swapped", [False, True])
def test_operands_lie_as_they_like(swapped: bool) -> None:
    """The result is contiguous, as a library's is: what follows it may view it."""
    a, b = torch.randn(3, 1, 5).transpose(1, 2), torch.randn(6, 1, 3).permute(2, 1, 0)

    def f(a: Tensor, b: Tensor) -> Tensor:
        left, right = (b.mT, a.mT) if swapped else (a, b)
        return torch.bmm(left, right).view(-1)

    run = torch.compile(f, backend=Compiler(engine="reference", strict=True))
    torch.testing.assert_close(run(a, b), f(a, b))


def _compiled_for_a_gpu(function: Any, *given: Tensor) -> tuple[Any, list[str]]:
    """What a function gives as a graph for a GPU, by the reference interpreter; and its calls."""
    records: list[Compilation] = []
    backend = Compiler(engine="reference", strict=True, on_compiled=records.append)
    with target.planned_for((9, 0)):
        found = torch.compile(function, backend=backend)(*given)
    plans = [plan for record in records for plan in record.plans.values()]
    return found, [s.target for plan in plans for s in plan.steps if isinstance(s, AtenStep)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",  # batch, M, K, N
    [(5, 7, 2, 6), (1, 7, 4, 6), (5, 1, 33, 6), (5, 7, 33, 1), (5, 2, 33, 2), (0, 1, 3, 5)],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_few_terms_and_vectors_on_a_gpu(
    shape: tuple[int, int, int, int], dtype: torch.dtype, transposed: bool
) -> None:
    torch.manual_seed(0)
    batch, m, k, n = shape
    a, b = torch.randn(batch, m, k), torch.randn(batch, k, n)
    if transposed:
        a, b = torch.randn(k, batch, m).permute(1, 2, 0), torch.randn(n, batch, k).permute(1, 2, 0)
    leaves = [x.to(dtype).requires_grad_() for x in (a, b)]
    weights = torch.randn(batch, m, n)

    def run(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        out = torch.bmm(a, b)
        return out, *torch.autograd.grad((out.float() * weights.to(out)).sum(), (a, b))

    def product_(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b)

    exact = run(*(x.detach().double().requires_grad_() for x in leaves))
    eager = run(*leaves)
    out, calls = _compiled_for_a_gpu(product_, *leaves)
    ours = (out, *torch.autograd.grad((out.float() * weights.to(out)).sum(), leaves))
    assert "aten.bmm.default" not in calls
    assert out.is_contiguous()
    for mine, theirs, true in zip(ours, eager, exact, strict=True):
        least = torch.finfo(dtype).eps
        error = (mine.double() - true).abs().amax() if mine.numel() else 0.0
        allowed = (theirs.double() - true).abs().amax() if mine.numel() else 0.0
        assert error <= 2 * allowed + least * (true.abs().amax() if mine.numel() else 0.0)


def test_what_is_not_finite_in_few_terms() -> None:
    a = torch.tensor([[[1.0, torch.inf], [torch.nan, 0.0]]]).repeat(2, 1, 1)
    b = torch.tensor([[[0.0, -1.0], [2.0, torch.inf]]]).repeat(2, 1, 1)
    found, calls = _compiled_for_a_gpu(torch.bmm, a, b)
    assert not calls
    torch.testing.assert_close(found, a @ b, equal_nan=True)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((5, 7, 5), (5, 5, 6)),  # too many terms
        ((5, 3, 33), (5, 33, 2)),  # too many results of a pair
        ((1, 1, 33), (1, 33, 6)),  # one vector by one matrix
    ],
)
def test_matrices_stay_contractions(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    left, right = torch.randn(a), torch.randn(b)
    found, calls = _compiled_for_a_gpu(torch.bmm, left, right)
    torch.testing.assert_close(found, left @ right)
    assert calls == ["aten.bmm.default"]
