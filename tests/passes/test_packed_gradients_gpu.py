"""A block of a GPT-2 on a GPU, its attention's gradients written where the projection's lies; or
side by side, of three projections.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.pipeline import DEFAULT, Pipeline
from tests.accuracy import assert_as_accurate_as_eager, relative_error
from tests.passes.test_packed_gradients import packings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDTH = 64


def program(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """No library has it, with dropout or without."""
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = torch.tanh(q @ k.mT * 0.004) * 30.0
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return F.dropout(weights, dropout_p) @ v


def library(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)


class Block(nn.Module):
    """``groups`` heads of keys and values for ``heads`` of queries, of one projection or of three
    ``apart``.
    """

    def __init__(
        self,
        attend: Callable[..., Tensor],
        dropout_p: float = 0.0,
        heads: int = 4,
        groups: int = 4,
        apart: bool = False,
    ) -> None:
        super().__init__()
        width = heads * WIDTH
        self.attend, self.dropout_p, self.heads, self.groups = attend, dropout_p, heads, groups
        self.norm = nn.LayerNorm(width)
        self.sizes = [n * WIDTH for n in (heads, groups, groups)]
        sizes = self.sizes if apart else [sum(self.sizes)]
        self.projections = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        parts = [project(normed) for project in self.projections]
        if len(parts) == 1:
            parts = parts[0].split(self.sizes, -1)
        q, k, v = (each.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for each in parts)
        k, v = (each.repeat_interleave(self.heads // self.groups, 1) for each in (k, v))
        mixed = self.attend(q, k, v, self.dropout_p)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def compiled(
    module: nn.Module,
    records: list[Compilation],
    pipeline: Pipeline = DEFAULT,
    mode: str = "default",
) -> Any:
    torch._dynamo.reset()
    backend = Compiler(
        strict=True, cache=False, on_compiled=records.append, pipeline=pipeline, mode=mode
    )
    return torch.compile(module, backend=backend)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("length", [256, 150])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_dropout(dtype: torch.dtype, groups: int, length: int, apart: bool) -> None:
    records: list[Compilation] = []

    def made() -> Block:
        torch.manual_seed(1)
        return Block(program, groups=groups, apart=apart)

    draws = [{"x": torch.randn(2, length, 4 * WIDTH, requires_grad=True)} for _ in range(4)]
    assert_as_accurate_as_eager(
        made, draws, lambda m: compiled(m, records), dtype=dtype, device="cuda", train=True
    )
    assert packings(records) == ["bs|hd:qkv"]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("attend", "dtype"),
    [(library, torch.bfloat16), (program, torch.bfloat16), (program, torch.float32)],
)
def test_dropout(attend: Callable[..., Tensor], dtype: torch.dtype, apart: bool) -> None:
    """As with gradients that are put together, of the same seed."""
    found = []
    for pipeline in (DEFAULT, DEFAULT.without("packed_gradients")):
        records: list[Compilation] = []
        torch.manual_seed(1)
        module = Block(attend, 0.1, apart=apart).to("cuda", dtype)
        x = torch.randn(2, 192, 4 * WIDTH, device="cuda", dtype=dtype, requires_grad=True)
        run = compiled(module, records, pipeline)
        torch.manual_seed(3)
        run(x).float().square().sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
        assert packings(records) == ["bs|hd:qkv" if pipeline is DEFAULT else ""]
    for ours, apart in zip(*found, strict=True):
        assert ours is not None
        assert relative_error(ours, apart) < max(2 * torch.finfo(dtype).eps, 1e-5)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_gradients_in_one_memory_are_added_up_in_place(mode: str) -> None:
    """Over two batches a step, with a fused optimizer; as float64 does it."""
    torch.manual_seed(1)
    exact = Block(program, apart=True).cuda().double()
    module, start = copy.deepcopy(exact).float(), parameters_to_vector(exact.parameters()).detach()
    records: list[Compilation] = []
    run = compiled(module, records, mode=mode)
    draws = torch.randn(4, 2, 2, 192, 4 * WIDTH, device="cuda")
    for each, of, dtype in ((run, module, torch.float32), (exact, exact, torch.float64)):
        optimizer = torch.optim.SGD(of.parameters(), lr=0.05, momentum=0.9, fused=True)
        for step in draws:
            for x in step:
                each(x.to(dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert packings(records) == ["bs|hd:qkv"]
    ours, theirs = (parameters_to_vector(each.parameters()) - start for each in (module, exact))
    assert relative_error(ours, theirs) < 1e-3
