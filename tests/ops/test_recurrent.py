"""The LSTM cell that stands for aten's CUDA kernel, against the cell the CPU runs."""

from __future__ import annotations

import pytest
import torch

from iocompiler.ops.decomposed.recurrent import lstm_cell, lstm_cell_backward
from tests.accuracy import relative_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["hidden", "cell", "both"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_cell_and_its_gradients(dtype: torch.dtype, which: str, has_bias: bool) -> None:
    rounded = [torch.randn(*s).to(dtype) for s in ((5, 28), (5, 28), (5, 7), (28,), (28,))]
    a, b, cell, *biases = (x.double().requires_grad_() for x in rounded)
    used = biases if has_bias else []
    eye = torch.eye(28, dtype=torch.float64)
    zeros = torch.zeros(28, dtype=torch.float64)
    # contractions with the identity: what is left of aten's cell is the pointwise part
    hidden, new = torch.lstm_cell(a, (_shaped(b), cell), eye, eye[:, :7], *(used or [zeros, zeros]))
    given = {"hidden": (1.0, 0.0), "cell": (0.0, 1.0), "both": (0.3, 0.7)}[which]
    loss = given[0] * (hidden * hidden).sum() + given[1] * (new * new).sum()
    wanted = torch.autograd.grad(loss, [a, cell, *used])

    hidden_gates = torch.zeros(5, 28, dtype=dtype)
    hidden_gates[:, :7] = rounded[1][:, :7]
    ours = lstm_cell(rounded[0], hidden_gates, rounded[2], *(rounded[3:] if has_bias else []))
    slack = 8 * torch.finfo(dtype).eps
    for mine, ref in zip(ours[:2], (hidden, new), strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, ref) <= slack
    grads = lstm_cell_backward(
        (2 * given[0] * ours[0]) if given[0] else None,
        (2 * given[1] * ours[1]) if given[1] else None,
        rounded[2], ours[1], ours[2], has_bias,
    )  # fmt: skip
    assert (grads[2] is not None) == has_bias
    for found, ref in zip([g for g in grads if g is not None], wanted, strict=False):
        assert found.dtype == dtype
        assert relative_error(found, ref) <= slack


def _shaped(b: torch.Tensor) -> torch.Tensor:
    return b[:, :7]


def test_no_gradient_gives_none() -> None:
    x = torch.zeros(2, 3)
    assert lstm_cell_backward(None, None, x, x, torch.zeros(2, 12), True) == (None, None, None)
