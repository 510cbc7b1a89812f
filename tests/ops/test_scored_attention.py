"""Attention with a score program on the CPU, against every matrix made; and what fakes promise."""

from __future__ import annotations

import pytest
import torch

from iocompiler.ops.scored_attention import FORWARD, ROWS, scored_attention
from tests.ops.score_programs import CASES, heads, reference, reference_rows

SHAPES = [(2, 4, 4, 33, 33, 8, 8), (2, 4, 2, 17, 40, 16, 12), (1, 3, 1, 40, 21, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_blockwise(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iocompiler.ops.scored_blockwise._ELEMENTS", 1000)
    torch.manual_seed(0)
    case, given = CASES[name], heads(*shape)
    batch, h, _, rows, columns = shape[:5]
    operands = case.operands(batch, h, rows, columns)
    leaves = [x.clone().requires_grad_() for x in given]
    learned = [x.clone().requires_grad_() if x.is_floating_point() else x for x in operands]
    ours = scored_attention(*leaves, case.program(), learned)
    exact = reference(*leaves, case.program(), learned)
    torch.testing.assert_close(ours, exact, equal_nan=True)
    differentiable = [*leaves, *(x for x in learned if x.requires_grad)]
    weights = torch.randn_like(exact).masked_fill(exact.isnan(), 0.0)
    found = torch.autograd.grad(ours, differentiable, weights)
    if exact.isnan().any():  # eager's gradients are NaN altogether
        assert all(x.isfinite().all() for x in found)
        return
    wanted = torch.autograd.grad(exact, differentiable, weights)
    for one, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, true)


@pytest.mark.parametrize("name", ["full", "alibi", "relative", "document", "sunk"])
def test_dropout_drops_the_same_in_the_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iocompiler.ops.scored_blockwise._ELEMENTS", 1000)
    torch.manual_seed(0)
    case, given = CASES[name], heads(*SHAPES[1])
    drop = {"seed": torch.tensor(2**62 + 7), "dropout_p": 0.4}
    operands = case.operands(2, 4, 17, 40)
    leaves = [x.clone().requires_grad_() for x in given]
    learned = [x.clone().requires_grad_() if x.is_floating_point() else x for x in operands]
    ours = scored_attention(*leaves, case.program(), learned, **drop)
    exact = reference(*leaves, case.program(), learned, **drop)
    torch.testing.assert_close(ours, exact)
    differentiable = [*leaves, *(x for x in learned if x.requires_grad)]
    weights = torch.randn_like(exact)
    pair = (torch.autograd.grad(x, differentiable, weights) for x in (ours, exact))
    for one, true in zip(*pair, strict=True):
        torch.testing.assert_close(one, true)


@pytest.mark.parametrize("name", ["alibi", "relative", "sunk", "document"])
def test_rows_with_a_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iocompiler.ops.scored_blockwise._ELEMENTS", 1000)
    torch.manual_seed(0)
    case, given = CASES[name], heads(*SHAPES[1])
    operands = case.operands(2, 4, 17, 40)
    leaves = [x.clone().requires_grad_() for x in given]
    learned = [x.clone().requires_grad_() if x.is_floating_point() else x for x in operands]
    arguments = (*leaves, learned, [], case.program().key, "blockwise", "ssss", None, 0.0, None, [])
    out, sums = FORWARD(*arguments)
    ours = (out, ROWS(sums, "blockwise"))
    exact = reference_rows(*leaves, case.program(), learned)
    torch.testing.assert_close(ours, exact)
    differentiable = [*leaves, *(x for x in learned if x.requires_grad)]
    weights = [torch.randn_like(x) for x in exact]
    for wanted in ([0, 1], [1]):  # of both, and of the log-sum-exp alone
        pair = [
            torch.autograd.grad(
                [x[n] for n in wanted], differentiable, [weights[n] for n in wanted],
                retain_graph=True, allow_unused=True,
            )
            for x in (ours, exact)
        ]  # fmt: skip
        for one, true in zip(*pair, strict=True):
            torch.testing.assert_close(one, torch.zeros_like(one) if true is None else true)


def test_dropout_that_cannot_be_is_an_error() -> None:
    given = heads(1, 1, 1, 4, 4, 8)
    with pytest.raises(ValueError, match="seed"):
        scored_attention(*given, CASES["full"].program(), dropout_p=0.5)
    with pytest.raises(ValueError, match="uniform"):
        scored_attention(
            *given,
            CASES["padding, uniform"].program(),
            CASES["padding, uniform"].operands(1, 1, 4, 4),
            seed=torch.tensor(1),
            dropout_p=0.5,
        )


def test_operator_is_registered_as_torch_wants_it() -> None:
    for name in ("alibi", "document"):
        case = CASES[name]
        operands = [x.float() if x.is_floating_point() else x for x in case.operands(2, 4, 9, 9)]
        operands = [x.requires_grad_() if x.is_floating_point() else x for x in operands]
        q, k, v = (x.float().requires_grad_() for x in heads(2, 4, 2, 9, 9, 8))
        arguments = (q, k, v, operands, [], case.program().key, "blockwise", "shsh")
        for drop in ((None, 0.0, None, []), (torch.tensor(5), 0.25, None, [])):
            torch.library.opcheck(FORWARD, (*arguments, *drop))
