"""Matrices of one column by matrices of one row: no contraction, and nothing in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.plan.data import AtenStep, made
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
