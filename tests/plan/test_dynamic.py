"""One plan for every size: results and gradients where sizes enter shapes and numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation


def rand(*shape: int) -> Tensor:
    return torch.randn(shape)


TABLES = ((3, 6), (4, 8), (7, 5))
FUNCTIONS = {
    "flatten": (lambda x: x.reshape(-1).exp().sum(), TABLES),
    "flatten, repeat": (lambda x: x.reshape(-1).repeat(3).sin().mean(), TABLES),
    "cat": (lambda x: torch.cat([x, x * 2], 1).view(-1).cumsum(0), TABLES),
    "a slice as long as a size": (lambda x: x.reshape(-1)[: x.shape[0] * 2].sin(), TABLES),
    "a slice from a size on": (lambda x: x.reshape(-1)[x.shape[0] :].sum(), TABLES),
    "half a row": (lambda x: x[:, : x.shape[1] // 2].sin().sum(), TABLES),
    "select at a product": (lambda x: x.reshape(-1)[x.shape[0] * x.shape[1] - 2].sin(), TABLES),
    "pad by a size": (lambda x: F.pad(x, (0, x.shape[0])).exp().sum(), TABLES),
    "variance": (lambda x: x.var(1) + x.var(0, correction=0).sum(), TABLES),
    "deviation": (lambda x: x.std(1), TABLES),
    "root of a size": (lambda x: x * x.shape[0] ** 0.5 + x.shape[1] ** -0.5, TABLES),
    "quotient of sizes": (lambda x: x * (x.shape[0] / (x.shape[1] + 1)), TABLES),
    "power of a size": (lambda x: x * float(x.shape[0]) ** 3 + x.shape[1] ** 2, TABLES),
    "logarithm of a size": (lambda x: x * torch.tensor(x.shape[0]).log(), TABLES),
    "norm over a size": (lambda x: F.layer_norm(x, (x.shape[-1],)), TABLES),
    "positions": (lambda x: x * torch.arange(x.shape[1]), TABLES),
    "flat contraction": (lambda x, w: (x.view(-1, 4) @ w).view(*x.shape[:2], -1).tanh(),
                         (((3, 5, 4), (4, 6)), ((4, 7, 4), (4, 6)))),
    "chunk": (lambda x: x.chunk(2, 1)[0].exp(), ((3, 6), (4, 8), (7, 10))),
    "triangle": (lambda x: x.tril().exp().sum(0), ((6, 6), (8, 8))),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_plan_serves_every_size(name: str) -> None:
    function, draws = FUNCTIONS[name]
    records: list[Compilation] = []
    backend = Compiler(engine="reference", strict=True, on_compiled=records.append)
    run = torch.compile(function, backend=backend, dynamic=True)
    for shapes in draws:
        listed = shapes if isinstance(shapes[0], tuple) else (shapes,)
        ours = [rand(*shape).requires_grad_() for shape in listed]
        theirs = [x.detach().clone().requires_grad_() for x in ours]
        result, expected = run(*ours), function(*theirs)
        torch.testing.assert_close(result, expected)
        weights = torch.randn_like(expected)
        result.backward(weights)
        expected.backward(weights)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    assert len(records) == 1


def test_a_number_computed_from_sizes_is_part_of_the_kernel() -> None:
    records: list[Compilation] = []
    backend = Compiler(engine="reference", strict=True, on_compiled=records.append)
    x = rand(5, 9).requires_grad_()
    torch.compile(lambda x: x.var(1), backend=backend, dynamic=True)(x).sum().backward()
    kinds = {type(step).__name__ for step in records[0].plans["backward"].steps}
    assert "AtenStep" not in kinds
