"""What is cut off is not computed: what moves, what stays, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.graph.findings import Rewrite, findings
from iocompiler.graph.normalise import normalise
from iocompiler.passes.slices import slices
from tests.accuracy import compare_with_eager

Captured = Callable[..., GraphModule]
Function: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
S, D = 6, 8


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], 2, D // 2).transpose(1, 2)


def mixed(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (heads(F.linear(x, each)) for each in (w, w + 1, w - 1))
    return attended(q, k, v).transpose(1, 2).reshape(x.shape[0], x.shape[1], D)


def by_library(x: Tensor, w: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (heads(F.linear(x, each)) for each in (w, w + 1, w - 1))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def by_hand(x: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * b


def lower(x: Tensor) -> Tensor:
    return torch.ones(S, S, device=x.device).tril().bool()


# the operators that run for the part alone
TAKEN: dict[str, tuple[Function, int]] = {
    "linear": (lambda x, w, b: F.linear(x, w, b)[:, 0], 1),
    "the last": (lambda x, w, b: F.gelu(F.linear(x, w))[:, -1], 2),
    "a slice": (lambda x, w, b: F.layer_norm(x @ w, (D,), b)[:, 1:3], 2),
    "a residual": (lambda x, w, b: (x + F.linear(x.sin(), w))[:, 0], 3),
    "a norm by hand": (lambda x, w, b: by_hand(F.linear(x, w), b)[:, -1], 7),
    "the batch": (lambda x, w, b: F.linear(x, w)[0], 1),
    "attention by hand": (lambda x, w, b: mixed(x, w)[:, 0], 5),
    "attention by the library": (lambda x, w, b: by_library(x, w)[:, 0], 2),
    "a mask": (lambda x, w, b: by_library(x, w, lower(x))[:, 2], 3),
    "sums": (lambda x, w, b: (x @ w).view(x.shape[0], S, 2, -1).sum(-1)[:, 3], 2),
    "joined": (lambda x, w, b: torch.cat([x @ w, x], -1)[:, :1], 2),
    "turned": (lambda x, w, b: (x @ w).permute(1, 0, 2)[0], 1),
    "a row that is the same for all": (lambda x, w, b: (x.mean(1, keepdim=True) + x @ w)[:, 1], 2),
}


def read_elsewhere(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.linear(x, w)
    return y[:, 0] * y.sum()


def two_parts(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.linear(x, w)
    return y[:, 0] * y[:, 1]


def written(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.linear(x, w)
    y[:, 0] += 1
    return y[:, 0]


DECLINED: dict[str, Function] = {
    "read elsewhere": read_elsewhere,
    "two parts": two_parts,
    "written": written,
    "most of it": lambda x, w, b: F.linear(x, w)[:, 1:],
    "in steps": lambda x, w, b: F.linear(x, w)[:, ::3],
    "along a sum": lambda x, w, b: F.linear(x, w)[..., 0],
    "along a softmax": lambda x, w, b: x.softmax(1)[:, 0],
    "along a scan": lambda x, w, b: x.cumsum(1)[:, 0],
    "normalised over it": lambda x, w, b: F.layer_norm(x, (S, D))[:, 0],
    "causal by a word": lambda x, w, b: F.scaled_dot_product_attention(x, x, x, is_causal=True)[
        :, -1
    ],
    "with itself": lambda x, w, b: (x @ x.transpose(1, 2)).sort(-1)[0][:, 0],
    "merged with another": lambda x, w, b: x.reshape(-1, D)[0],
    "only views": lambda x, w, b: x.transpose(1, 2).contiguous().transpose(1, 2)[:, 0],
    "sorted": lambda x, w, b: x.sort(1)[0][:, 0],
}


def rewritten(gm: GraphModule) -> int:
    normalise(gm)
    return slices(gm)


def given() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, S, D), torch.randn(D, D), torch.randn(D)


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str, captured: Captured) -> None:
    function, count = TAKEN[name]
    gm = captured(function, *given())
    assert rewritten(gm) == 1
    (found,) = (f for f in findings(gm) if isinstance(f, Rewrite))
    assert (found.pattern, found.variant) == ("slices", f"{count} operators")


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str, captured: Captured) -> None:
    gm = captured(DECLINED[name], *given())
    assert rewritten(gm) == 0


class Model(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.w, self.b = nn.Parameter(torch.empty(D, D)), nn.Parameter(torch.empty(D))
        for number, parameter in enumerate(self.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w, self.b) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TAKEN)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    found = compare_with_eager(
        lambda: Model(TAKEN[name][0]),
        {"x": torch.randn(4, S, D).to(dtype).requires_grad_()},
        lambda module: torch.compile(module, backend=Compiler(engine="reference", strict=True)),
        dtype=dtype,
        device="cpu",
        train=True,
    )
    assert all(each.ok for each in found), [str(each) for each in found if not each.ok]


def test_a_part_of_a_part(captured: Captured) -> None:
    """What the first cut made is walked through for the second."""

    def parts(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        first = F.linear(x, w)[:, :3].sin()
        return F.linear(first, w)[:, 0] + b

    gm = captured(parts, *given())
    assert rewritten(gm) == 2
    inputs = given()
    gm.recompile()
    (found,) = tree_leaves(gm(*inputs))
    torch.testing.assert_close(found, parts(*inputs))


def test_any_length() -> None:
    records: list[Compilation] = []
    torch._dynamo.reset()
    compiler = Compiler(engine="reference", strict=True, on_compiled=records.append)

    w, b = given()[1:]

    def last(x: Tensor) -> Tensor:
        return F.linear(by_hand(mixed(x, w), b), w)[:, -1]

    run = torch.compile(last, backend=compiler, dynamic=True)
    for batch, length in ((2, 5), (3, 9), (5, 2)):
        x = torch.randn(batch, length, D)
        torch.testing.assert_close(run(x), last(x))
    (record,) = records
    assert [r.pattern for r in record.rewrites].count("slices") == 1


def test_dropout_is_drawn_for_the_part() -> None:
    records: list[Compilation] = []
    torch._dynamo.reset()
    compiler = Compiler(engine="reference", strict=True, on_compiled=records.append)

    def first(x: Tensor) -> Tensor:
        return F.dropout(F.linear(x, torch.eye(D)), 0.5)[:, 0]

    run = torch.compile(first, backend=compiler)
    x = torch.ones(200, S, D, requires_grad=True)
    y = run(x)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (y == 0).float().mean() < 0.6
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[:, 0], y.detach())
    assert not x.grad[:, 1:].any()
    assert [r.pattern for r in records[0].rewrites] == ["slices"]
