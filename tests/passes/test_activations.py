"""Activations in a product's epilogue: where nobody else reads what they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.convenience import explain
from tests.accuracy import relative_error

HALF = torch.bfloat16
FUSED = "aten._addmm_activation.default"


class Feed(torch.nn.Module):
    """A linear, an activation, a linear."""

    def __init__(self, act: Callable[[Tensor], Tensor], width: int = 64, bias: bool = True) -> None:
        super().__init__()
        self.first = torch.nn.Linear(32, width, bias)
        self.last = torch.nn.Linear(width, 32)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))  # type: ignore[no-any-return]


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def read_twice(x: Tensor) -> Tensor:
    return gelu(x) + x


def _kernels(module: torch.nn.Module, dtype: torch.dtype, training: bool) -> list[str]:
    report = explain(module.to(dtype), torch.randn(4, 8, 32, dtype=dtype), device="h200",
                     training=training)  # fmt: skip
    return [kernel.name for kernel in report.kernels]


@pytest.mark.parametrize(
    ("act", "training", "fused"),
    [
        (gelu, False, 1),
        (gelu, True, 0),  # its backward reads what it read
        (F.gelu, False, 0),  # not what the library computes
        (F.relu, False, 1),
        (F.relu, True, 1),
        (F.silu, False, 0),
        (read_twice, False, 0),
    ],
)
def test_taken_where_nobody_else_reads(act: Any, training: bool, fused: int) -> None:
    assert _kernels(Feed(act), HALF, training).count(FUSED) == fused


def test_declined_where_the_library_has_no_such_epilogue() -> None:
    assert FUSED not in _kernels(Feed(gelu), torch.float32, False)
    assert FUSED not in _kernels(Feed(gelu, bias=False), HALF, False)
    assert FUSED not in _kernels(Feed(gelu, width=61), HALF, False)


def test_the_cpu_keeps_its_own() -> None:
    records: list[Compilation] = []
    module = Feed(gelu).to(HALF)
    run = torch.compile(module, backend=Compiler(engine="reference", on_compiled=records.append))
    with torch.no_grad():
        run(torch.randn(4, 8, 32, dtype=HALF))
    calls = {str(n.target) for g in records[0].flat.values() for n in g.graph.nodes}
    assert FUSED not in calls


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", [gelu, F.relu])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_on_the_gpu(act: Any, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Feed(act, width=128).cuda()
    x = torch.randn(3, 70, 32, device="cuda")
    wide = Feed(act, width=128).cuda().double()
    wide.load_state_dict(module.state_dict())
    module = module.to(dtype)
    run = torch.compile(module, backend=Compiler(), dynamic=dynamic)

    def results(f: Any, given: torch.nn.Module, x: Tensor) -> list[Tensor]:
        if not training:
            with torch.no_grad():
                return [f(x)]
        y = f(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(given.parameters()))]

    triples = zip(
        results(run, module, x.to(dtype)),
        results(module, module, x.to(dtype)),
        results(wide, wide, x.to(dtype).double()),
        strict=True,
    )
    for place, (mine, theirs, exact) in enumerate(triples):
        allowed = (3 if place else 2) * max(relative_error(theirs, exact), 1e-3) + 1e-5
        assert relative_error(mine, exact) <= allowed, place
