"""GELU by hand: the spellings that are one operator, and those that only look like it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from iocompiler.passes.gelu import gelu_by_erf, gelu_by_tanh
from tests.plan.graphs import Planned, relative_error

Captured = Callable[..., GraphModule]
SCALE = math.sqrt(2 / math.pi)

TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "Hugging Face": lambda x: (
        0.5 * x * (1.0 + torch.tanh(SCALE * (x + 0.044715 * torch.pow(x, 3.0))))
    ),
    "Megatron": lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
    "products": lambda x: 0.5 * (x * (1 + torch.tanh(SCALE * (x + 0.044715 * (x * x * x))))),
    "a gate": lambda x: x * (0.5 * (1.0 + torch.tanh(SCALE * (x + 0.044715 * x**3)))),
    "FastGELU": lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "erf of a quotient": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "erf of a product": lambda x: 0.5 * x * (1.0 + torch.erf(x * 0.70710678118)),
    "erf in a gate": lambda x: x * (0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))),
}

DECLINED: dict[str, Callable[[Tensor], Tensor]] = {
    "another cubic": lambda x: 0.5 * x * (1.0 + torch.tanh(SCALE * (x + 0.05 * x**3))),
    "another scale": lambda x: 0.5 * x * (1.0 + torch.tanh(0.85 * (x + 0.044715 * x**3))),
    "another power": lambda x: 0.5 * x * (1.0 + torch.tanh(SCALE * (x + 0.044715 * x**2))),
    "not halved": lambda x: x * (1.0 + torch.tanh(SCALE * (x + 0.044715 * x**3))),
    "shifted by two": lambda x: 0.5 * x * (2.0 + torch.erf(x / math.sqrt(2.0))),
    "erf of x": lambda x: 0.5 * x * (1.0 + torch.erf(x)),
    "a quotient by the root of a half": lambda x: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(0.5))),
    "another factor": lambda x: 0.5 * (x + 1) * (1.0 + torch.erf(x / math.sqrt(2.0))),
}


def sites(gm: GraphModule) -> int:
    return gelu_by_tanh(gm) + gelu_by_erf(gm)


@pytest.mark.parametrize("name", TAKEN)
def test_taken(captured: Captured, name: str) -> None:
    gm = captured(TAKEN[name], torch.randn(4, 7))
    assert sites(gm) == 1
    gm.recompile()
    x = 4 * torch.randn(5, 9, dtype=torch.float64)
    torch.testing.assert_close(gm(x)[0], TAKEN[name](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DECLINED)
def test_declined(captured: Captured, name: str) -> None:
    assert sites(captured(DECLINED[name], torch.randn(4, 7))) == 0


def test_integers_are_left_alone(captured: Captured) -> None:
    assert sites(captured(TAKEN["erf of a quotient"], torch.arange(4))) == 0


def test_a_part_that_something_else_reads_stays(captured: Captured) -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        gate = 1.0 + torch.erf(x / math.sqrt(2.0))
        return 0.5 * x * gate, gate

    assert sites(captured(f, torch.randn(4, 7))) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradients(dtype: torch.dtype, approximate: str) -> None:
    """Of the operator itself: what a kernel computes, far out too."""

    def gradient(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad((run(x) * weight.to(x.dtype)).sum(), x)[0]

    f = lambda x: torch.nn.functional.gelu(x, approximate=approximate)
    x = torch.cat([6 * torch.randn(501), torch.tensor([0.0, -0.0, 30.0, -30.0])]).to(dtype)
    weight = torch.randn(x.shape, dtype=torch.float64)
    want = gradient(f, x.double())
    allowed = 3 * relative_error(gradient(f, x), want) + 1e-5
    assert relative_error(gradient(Planned()(f), x), want) <= allowed
