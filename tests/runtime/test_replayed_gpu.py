"""Operators' calls done again: the same bits, and fresh ones as exact."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler import Compiler
from iocompiler.runtime.replayed import Replayed
from tests.accuracy import assert_near_exact

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.shape[-1])


def behind(s: Tensor) -> Tensor:
    rows, columns = (torch.arange(n, device=s.device) for n in s.shape[-2:])
    return rows[:, None] - columns


def mixed(s: Tensor, keep: Tensor, v: Tensor) -> Tensor:
    return s.masked_fill(~keep, float("-inf")).softmax(-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    s = scores(q, k)
    return mixed(s - slopes[:, None, None] * behind(s), behind(s) >= 0, v)


def decode(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    s = scores(q, k)
    return (s - slopes[:, None, None] * behind(s)).softmax(-1) @ v


def document(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s = scores(q, k)
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return mixed(s, same & (behind(s) >= 0), v)


def biased(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    s = scores(q, k)
    return mixed(s + table[:, : s.shape[-2], : s.shape[-1]], behind(s) >= 0, v)


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = 20 * torch.tanh(scores(q, k) / 20)
    return F.dropout(s.masked_fill(behind(s) < 0, float("-inf")).softmax(-1), 0.2) @ v


def given(f: Callable[..., Tensor], length: int, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    made = [torch.randn(2, length, 4, 64, device="cuda").to(BF16).transpose(1, 2) for _ in "qkv"]
    if f in (alibi, decode):
        made.append(torch.rand(4, device="cuda").to(BF16))
    if f is biased:
        made.append(torch.randn(4, length, length, device="cuda").to(BF16))
    if f is document:
        ends = torch.randint(0, 3, (2, length), device="cuda")
        made.append((ends == 0).cumsum(1) // (length // 8))
    return [x.requires_grad_() if x.is_floating_point() else x for x in made]


def step(f: Callable[..., Tensor], inputs: list[Tensor], seed: int) -> list[Tensor]:
    """Result and gradients."""
    torch.manual_seed(seed)
    for x in inputs:
        x.grad = None
    out = f(*inputs)
    out.backward(torch.cos(torch.arange(out.numel(), device="cuda")).view(out.shape).to(out.dtype))
    return [out.detach().clone(), *(x.grad.clone() for x in inputs if x.grad is not None)]


def exact(f: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return step(f, [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x
                    for x in inputs], 0)  # fmt: skip


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The forms of the calls that operators did."""
    found: list[Any] = []
    whole = Replayed._watched

    def noted(self: Replayed, form: Any, *rest: Any) -> Any:
        found.append(form)
        return whole(self, form, *rest)

    monkeypatch.setattr(Replayed, "_watched", noted)
    return found


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("f", [alibi, document, biased, dropped])
def test_the_same_bits(f: Callable[..., Tensor], mode: str, watched: list[Any]) -> None:
    torch._dynamo.reset()
    run = torch.compile(f, backend=Compiler(mode=mode, strict=True, cache=False))
    inputs = given(f, 384, 0)
    first = step(run, inputs, 5)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        again = step(run, inputs, 5)
        assert all(map(torch.equal, first, again))
    calls = len(watched)
    assert calls, "no operator's calls are done again"
    torch.compiler.cudagraph_mark_step_begin()
    fresh = given(f, 384, 1)
    found = step(run, fresh, 0)
    assert len(watched) == calls
    if f is not dropped:
        assert_near_exact(found, exact(f, fresh, BF16), exact(f, fresh, torch.float64), BF16)


@pytest.mark.parametrize("f", [alibi, document])
def test_lengths_that_change(f: Callable[..., Tensor], watched: list[Any]) -> None:
    torch._dynamo.reset()
    run = torch.compile(f, backend=Compiler(strict=True, cache=False))
    for turn in range(5):
        calls = len(watched)
        for length in (192, 250, 384):
            inputs = given(f, length, turn)
            found = step(run, inputs, 0)
            assert_near_exact(found, exact(f, inputs, BF16), exact(f, inputs, torch.float64), BF16)
        if turn > 3:
            assert 0 < len(watched) == calls


def test_decoding(watched: list[Any]) -> None:
    """Lengths that a cache comes back to: after a graph for any length, no operator runs."""
    torch._dynamo.reset()
    run = torch.compile(decode, backend=Compiler(strict=True, cache=False))
    with torch.no_grad():
        for turn in range(5):
            calls = len(watched)
            for length in (300, 301, 302):
                q, *rest = given(decode, length, turn)
                inputs = [q[:, :, :1], *rest]
                eager, wide = (
                    decode(*(x.to(dtype) for x in inputs)) for dtype in (BF16, torch.float64)
                )
                assert_near_exact([run(*inputs)], [eager], [wide], BF16)
            assert turn or len(watched) == 3
            assert turn < 3 or len(watched) == calls


class Small(torch.nn.Module):
    """An embedding, an attention without dropout, which is the library's, and a head with its loss;
    the logits are kept, or not.
    """

    def __init__(self, vocabulary: int, keep: bool) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(vocabulary, 256)
        self.packed = torch.nn.Linear(256, 3 * 256)
        self.head = torch.nn.Linear(256, vocabulary, bias=False)
        self.keep = keep

    def forward(self, ids: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        rows = self.packed(self.table(ids)).unflatten(-1, (3, 4, 64))
        q, k, v = (x.transpose(1, 2) for x in rows.unbind(2))
        hidden = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        logits = self.head(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        return (loss, logits) if self.keep else (loss,)


def trained(model: torch.nn.Module, run: Callable[..., Any], seed: int) -> list[Tensor]:
    """Loss, logits if they are kept, and gradients."""
    make = torch.Generator("cuda").manual_seed(seed)
    vocabulary = model.head.out_features
    ids, target = (
        torch.randint(0, vocabulary, (4, 512), device="cuda", generator=make) for _ in range(2)
    )
    model.zero_grad()
    loss, *logits = run(ids, target)
    loss.backward()
    return [
        loss.detach(),
        *(x.detach() for x in logits),
        *(p.grad.clone() for p in model.parameters()),
    ]


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("vocabulary", [32768, 32771])
def test_heads_embeddings_and_a_librarys_attention(
    vocabulary: int, keep: bool, mode: str, watched: list[Any]
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Small(vocabulary, keep).cuda().to(BF16)
    wide = copy.deepcopy(model).double()
    run = torch.compile(model, backend=Compiler(mode=mode, strict=True, cache=False))
    peaks, first = [], trained(model, run, 3)
    for _ in range(5):
        calls = len(watched)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        again = trained(model, run, 3)
        peaks.append(torch.cuda.max_memory_allocated())
        assert all(map(torch.equal, first, again))
    assert 3 <= len(watched) == calls
    assert max(peaks) <= peaks[-1] + 2**20
    assert_near_exact(
        trained(model, run, 4), trained(model, model, 4), trained(wide, wide, 4), BF16
    )
    assert len(watched) == calls
    with torch.no_grad():
        for seed in range(6):
            calls = len(watched)
            ids = torch.randint(0, vocabulary, (4, 512), device="cuda")
            found, eager, exact = (list(f(ids, ids)) for f in (run, model, wide))
            assert_near_exact(found, eager, exact, BF16)
            assert seed < 4 or len(watched) == calls
