"""Attention written out, inputs for it, and the accuracy rule applied to the op."""

from __future__ import annotations

import torch
from torch import Tensor

from iocompiler.ops.attention import attention

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """softmax(scale * q @ k^T + bias) @ v, with every matrix made."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~keep, float("-inf"))
    return scores.softmax(-1) @ v


def inputs(
    rows: int,
    columns: int,
    groups: int,
    bias: tuple[int, int] | None,
    width: int = 8,
    heads: int = 4,
) -> Inputs:
    """Query and value in [B, S, H, D] memory order, key in [B, H, S, D]; float64."""
    make = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=make)

    q, v = (
        draw(2, rows, heads, width).transpose(1, 2),
        draw(2, columns, groups, width).transpose(1, 2),
    )
    return q, draw(2, groups, columns, width), v, draw(*bias, rows, columns) if bias else None


def accuracy(
    given: Inputs,
    dtype: torch.dtype,
    *,
    scale: float,
    causal: bool,
    kernel: str = "",
    device: str = "cpu",
) -> list[str]:
    """What errs against float64 more than 2x (output) or 3x (gradients) eager's error."""
    rounded = [None if x is None else x.to(device, dtype) for x in given]
    runs: list[list[Tensor]] = []
    for to, run in (
        (torch.float64, lambda q, k, v, b: reference(q, k, v, b, scale, causal)),
        (dtype, lambda q, k, v, b: reference(q, k, v, b, scale, causal)),
        (
            dtype,
            lambda q, k, v, b: attention(q, k, v, b, scale=scale, causal=causal, kernel=kernel),
        ),
    ):
        fed = [None if x is None else x.detach().to(to).requires_grad_() for x in rounded]
        out = run(*fed)
        weights = torch.linspace(0, 1, out.shape[-1], dtype=to, device=device)
        runs.append(
            [out, *torch.autograd.grad((out * weights).sum(), [x for x in fed if x is not None])]
        )
    problems = []
    for place, (exact, eager, ours) in enumerate(zip(*runs, strict=True)):
        assert ours.dtype == dtype
        errors = [(x.double() - exact).abs().max().item() for x in (eager, ours)]
        if not errors[1] <= (3 if place else 2) * errors[0] + 1e-5:
            problems.append(f"result {place}: error {errors[1]:.3g}, eager's {errors[0]:.3g}")
    return problems
