"""Results that overlap themselves: every place has its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from iocompiler.compilation import Compilation
from tests.compiling import compiled, compiler

Function = Callable[[Tensor, Tensor], Any]


def gradients(run: Function, x: Tensor, y: Tensor) -> list[Tensor]:
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    found = run(x, y)
    results = [t for t in (found if isinstance(found, tuple) else (found,)) if t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in results]
    return [*results, *torch.autograd.grad(results, [x, y], given, allow_unused=True)]


def copies(records: list[Compilation]) -> int:
    return sum(each.pattern == "overlapping_results" for r in records for each in r.rewrites)


TAKEN: dict[str, Function] = {
    "windows": lambda x, y: (x * y).unfold(-1, 2, 1),
    "wider windows": lambda x, y: (x * y).unfold(-1, 3, 2),
    "strided": lambda x, y: (x * y).as_strided((3, 4, 2), (8, 1, 1)),
    "beside another": lambda x, y: ((x * y).unfold(-1, 2, 1), (x * y).sum()),
    "under no_grad in part": lambda x, y: (x * y.detach()).unfold(-1, 2, 1),
}
LEFT: dict[str, Function] = {
    "windows side by side": lambda x, y: (x * y).unfold(-1, 2, 2),
    "an input's": lambda x, y: (y.unfold(-1, 2, 1), x + 1),
    "what another result shows": lambda x, y: (lambda z: (z.unfold(-1, 2, 1), z[:, :3]))(x * y),
    "expanded": lambda x, y: (x * y)[:, None].expand(4, 3, 8),
    "transposed": lambda x, y: (x * y).t(),
    "not differentiated": lambda x, y: ((x * y).detach().unfold(-1, 2, 1), x * y),
    "nothing": lambda x, y: (x * y)[:, :0].unfold(-1, 0, 1),
    "windows of one": lambda x, y: (x * y).unfold(-1, 1, 1),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", [*TAKEN, *LEFT])
def test_gradients(name: str, dynamic: bool | None) -> None:
    function = {**TAKEN, **LEFT}[name]
    records: list[Compilation] = []
    run = compiler(records, dynamic=dynamic)(function)
    x, y = torch.randn(4, 1, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(gradients(run, x, y), gradients(function, x, y))
    if not dynamic:
        assert bool(copies(records)) == (name in TAKEN)


def test_inference_copies_nothing() -> None:
    run, records = compiled(TAKEN["windows"])
    x, y = torch.randn(4, 1), torch.randn(4, 8)
    assert run(x, y).stride() == (8, 1, 1)
    assert not copies(records)
