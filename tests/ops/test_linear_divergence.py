"""Linear + divergence in chunks: losses and gradients against float64, and no whole logits."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.ops import linear_cross_entropy_chunks as chunks
from iocompiler.ops.linear_cross_entropy_rows import Setting
from iocompiler.ops.linear_divergence import LINEAR_DIVERGENCE
from iocompiler.ops.linear_divergence_rows import Divergence
from tests.accuracy import relative_error

VOCABULARY, WIDTH, OTHER_WIDTH = 150, 24, 17
CASES = [
    (Setting(), Divergence(scale=0.5, outer=0.5)),
    (Setting(), Divergence(entropy=False)),
    (Setting(), Divergence(scale=0.7, outer=1.3, reversed=True)),
    (Setting(), Divergence(scale=-0.7, outer=-1.3, reversed=True, entropy=False)),
    (Setting(-100, 0.1, 3.0, 0.4, True), Divergence(1.5, "logits", 2.0, 0.3, True)),
    (Setting(), Divergence(0.5, "probabilities")),
    (Setting(-100, 0.0, 0.8), Divergence(1.0, "probabilities", entropy=False, spread=0.1)),
    (Setting(), Divergence(0.5, "log-probabilities")),
    (Setting(), Divergence(0.5, "log-probabilities", reversed=True)),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", 1)  # the least: 128 rows


def inputs(rows: int, dtype: torch.dtype, kind: str, hard: bool) -> list[Any]:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, WIDTH), torch.randn(VOCABULARY, WIDTH) / 4, None
    other: list[Tensor | None] = [torch.randn(rows, VOCABULARY).log_softmax(1) - 0.1, None, None]
    if kind == "probabilities":
        other[0] = F.dropout(torch.rand(rows, VOCABULARY), 0.3)
    if kind == "logits":
        other = [torch.randn(rows, OTHER_WIDTH), torch.randn(VOCABULARY, OTHER_WIDTH) / 4]
        other += [torch.randn(VOCABULARY)]
    heads = [t if t is None else t.to(dtype).requires_grad_() for t in (x, weight, bias, *other)]
    if kind != "logits":
        heads[3] = heads[3].detach()
    target = torch.randint(0, VOCABULARY, (rows,))
    target[::5] = -100
    shares = [torch.rand(rows) * (torch.arange(rows) % 7 > 0) for _ in range(3)]
    return [*heads, target, *shares] if hard else [*heads, None, None, None, shares[2]]


def ours(given: list[Any], setting: Setting, divergence: Divergence, reduction: str) -> Tensor:
    loss: Tensor = LINEAR_DIVERGENCE(*given, *astuple(setting), *astuple(divergence), reduction)
    return loss


def eager(given: list[Any], setting: Setting, divergence: Divergence, reduction: str) -> Tensor:
    x, weight, bias, other, other_weight, other_bias, target, coefficient, squared, share = given
    wide = torch.promote_types(x.dtype, torch.float32)
    z = F.linear(x, weight, bias).to(wide)
    u = torch.tanh(setting.inner * z) if setting.capped else z
    logq = F.log_softmax(divergence.scale * u, -1)
    p = other.to(wide)
    if divergence.kind == "log-probabilities":
        logp, p = p, p.exp()
    elif divergence.kind == "probabilities":
        p = (1 - divergence.spread) * p + divergence.spread / VOCABULARY
        logp = torch.where(p == 0, 0.0, p.log())
    else:
        t = F.linear(other, other_weight, other_bias).to(wide)
        t = torch.tanh(divergence.inner * t) if divergence.capped else t
        logp = F.log_softmax(divergence.outer * t, -1)
        p = logp.exp()
    e = int(divergence.entropy)
    each = logq.exp() * (e * logq - logp) if divergence.reversed else p * (e * logp - logq)
    loss = each.sum(1) * share
    if target is not None:
        hard = F.cross_entropy(
            setting.outer * u, target, reduction="none", label_smoothing=setting.smoothing
        )
        lse = (setting.outer * u).logsumexp(1)
        loss = loss + coefficient * hard + squared * lse**2
    return loss.sum() if reduction == "sum" else loss


def results(function: Any, given: list[Any], *rest: Any) -> list[Tensor]:
    loss = function(given, *rest)
    cotangent = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    leaves = [t for t in given[:6] if t is not None and t.requires_grad]
    return [loss, *torch.autograd.grad(loss, leaves, cotangent)]


def widened(given: list[Any]) -> list[Any]:
    return [
        t.detach().double().requires_grad_(t.requires_grad)
        if t is not None and t.is_floating_point()
        else t
        for t in given
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("setting", "divergence"), CASES)
def test_is_as_accurate_as_eager(
    dtype: torch.dtype, reduction: str, hard: bool, setting: Setting, divergence: Divergence
) -> None:
    given, rest = inputs(300, dtype, divergence.kind, hard), (setting, divergence, reduction)
    found = results(ours, given, *rest), results(eager, given, *rest)
    for place, (mine, theirs, exact) in enumerate(
        zip(*found, results(eager, widened(given), *rest), strict=True)
    ):
        factor = 3 if place else 2
        least = torch.finfo(dtype).eps / 2
        allowed = factor * max(relative_error(theirs, exact), least) + 1e-5
        assert relative_error(mine, exact) <= allowed, place
        assert mine.dtype == theirs.dtype
