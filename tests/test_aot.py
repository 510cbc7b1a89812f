"""What AOTAutograd is told of a graph's inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from iocompiler import Compiler
from iocompiler.engines import fixed_inputs
from iocompiler.plan.data import Plan


class Held(nn.Module):
    """A parameter, a buffer, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.register_buffer("mean", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], device=x.device)
        return (x - self.mean) @ self.weight * scale


def test_parameters_and_buffers_stay_where_they_are() -> None:
    """CUDA graphs read them in place, and copy every other input."""
    found: list[list[str]] = []

    def engine(plan: Plan, gm: GraphModule) -> Callable[[list[Any]], Any]:
        found.append([plan.inputs[position][0] for position in fixed_inputs()])
        return lambda args: Interpreter(gm).boxed_run(args)

    module, x = Held(), torch.randn(4, 6, requires_grad=True)
    compiled = torch.compile(module, backend=Compiler(engine=engine, strict=True))
    torch.testing.assert_close(compiled(x), module(x))
    assert [len(names) for names in found] == [3]  # weight, mean and the constant
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
    assert [len(names) for names in found] == [3, 3]
