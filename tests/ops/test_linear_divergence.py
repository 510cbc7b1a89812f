"""Linear + divergence in chunks: losses and gradients against float64, and no whole logits."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iocompiler.ops import linear_cross_entropy_chunks as chunks
from iocompiler.ops import linear_cross_entropy_head as heads
from iocompiler.ops import linear_divergence as operators
from iocompiler.ops.linear_cross_entropy_rows import Setting
from iocompiler.ops.linear_divergence import LINEAR_DIVERGENCE
from iocompiler.ops.linear_divergence_rows import Divergence
from tests.accuracy import assert_near_exact, relative_error

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
    cotangent = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype, device=loss.device)
    cotangent = cotangent.reshape(loss.shape)
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
    runs = ((ours, given), (eager, given), (eager, widened(given)))
    assert_near_exact(*(results(f, tensors, *rest) for f, tensors in runs), dtype)


_INSIDE = {operators.LOSSES: operators._losses, operators.GRADIENTS: operators._gradients}


class Largest(TorchDispatchMode):
    """The most rows of logits that a call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _INSIDE:
            with self:  # what the operator itself calls
                return _INSIDE[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor) and each.dim() == 2 and each.shape[1] == VOCABULARY:
                self.rows = max(self.rows, each.shape[0])
        return result


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_neither_logits_are_ever_whole(reduction: str) -> None:
    given = inputs(1000, torch.float32, "logits", True)
    with Largest() as seen:
        ours(given, *CASES[0], reduction).sum().backward()
    assert 0 < seen.rows <= 128


def test_an_odd_vocabulary_is_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "on_gpu", lambda x: True)
    test_is_as_accurate_as_eager(torch.bfloat16, "sum", True, *CASES[0])


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows_and_none(kind: str, rows: int) -> None:
    given, how = inputs(rows, torch.float32, kind, True), Divergence(0.5, kind)
    for mine, theirs in zip(
        results(ours, given, Setting(), how, "sum"),
        results(eager, given, Setting(), how, "sum"),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("wanted", [[0], [1], [3], [4], [5], []])
def test_only_what_is_needed_is_computed(wanted: list[int]) -> None:
    given = inputs(40, torch.float32, "logits", True)
    whole = results(ours, given, *CASES[0], "none")[1:]
    places = [place for place in range(6) if given[place] is not None]
    for place in places:
        given[place] = given[place].detach().requires_grad_(place in wanted)
    loss = ours(given, *CASES[0], "none")
    assert loss.requires_grad == bool(wanted)
    if wanted:
        loss.backward(torch.linspace(0.5, 2, 40))
        for place, expected in zip(places, whole, strict=True):
            found = given[place].grad
            if place in wanted:
                torch.testing.assert_close(found, expected)
            else:
                assert found is None


def test_what_is_given_needs_no_gradient_and_lies_anywhere() -> None:
    given = inputs(40, torch.float32, "probabilities", False)
    expected = results(ours, given, *CASES[5], "sum")
    given[3] = given[3].t().contiguous().t().requires_grad_()
    loss = ours(given, *CASES[5], "sum")
    torch.testing.assert_close([loss, *torch.autograd.grad(loss / 2, given[:2])], expected)


def test_small_shares_keep_their_gradients_in_half_precision() -> None:
    """As in a mean over many rows."""
    given = inputs(300, torch.float16, "logits", True)
    for place in (7, 8, 9):
        given[place] = given[place] * 1e-7
    found = results(ours, given, *CASES[0], "sum")
    exact = results(eager, widened(given), *CASES[0], "sum")
    scale = 1e7  # the gradients themselves are float16
    given = [t * scale if place in (7, 8, 9) else t for place, t in enumerate(given)]
    larger = results(ours, given, *CASES[0], "sum")
    assert relative_error(found[0], exact[0]) < 1e-3
    assert relative_error(larger[1].double() / scale, exact[1]) < 4e-3


def test_rows_without_a_share_add_nothing() -> None:
    given = inputs(40, torch.float32, "logits", False)
    given[3:6] = [t.detach() for t in given[3:6]]
    given[3][3], given[3][4] = torch.nan, torch.inf
    given[9][3:5] = 0.0
    for each in results(ours, given, *CASES[0], "sum"):
        assert each.isfinite().all()
    given[9][3] = 1.0
    assert results(ours, given, *CASES[0], "sum")[0].isnan()


@pytest.mark.parametrize(
    "wrong", [{"kind": "odds"}, {"spread": 0.1}, {"kind": "probabilities", "spread": 0.1}]
)
def test_settings_that_do_not_go_together(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no divergence"):
        Divergence(**wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("setting", "divergence"), CASES)
def test_on_the_gpu(
    dtype: torch.dtype, hard: bool, setting: Setting, divergence: Divergence
) -> None:
    """150 classes are odd in every dtype."""
    given = [
        t if t is None else t.detach().cuda().requires_grad_(t.requires_grad)
        for t in inputs(300, dtype, divergence.kind, hard)
    ]
    for reduction in ("sum", "none"):
        rest = (setting, divergence, reduction)
        runs = ((ours, given), (eager, given), (eager, widened(given)))
        assert_near_exact(*(results(f, tensors, *rest) for f, tensors in runs), dtype)
