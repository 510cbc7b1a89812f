"""The templates against float64 and against eager's own error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from iocompiler.cost_model.attention_decode import Decode, tile
from iocompiler.cost_model.attention_tiles import Row, Tile
from iocompiler.runtime import (
    attention,
    attention_decode,
    attention_form,
    attention_operands,
)
from iocompiler.runtime.attention import Problem
from tests.ops.score_programs import CASES, heads, reference_rows

Shape = tuple[int, int, int, int, int, int, int]
"""Batch, heads, groups, rows, columns, width, value width."""


def problems(
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    tiles: Row | None = None,
    scale: float = 0.3,
    gradients: bool = True,
    dropout_p: float = 0.0,
    by_rows: bool = False,
) -> list[str]:
    """What errs more than 2x (output) or 3x (gradients) eager's error in ``dtype``, plus 1e-5,
    or 1e-6 of the largest number.

    Args:
        by_rows: the log-sum-exp of each row has a gradient too.
    """
    seed = torch.tensor(2**40 + 12345, device=device) if dropout_p else None
    drop = {"seed": seed, "dropout_p": dropout_p}
    torch.manual_seed(0)
    case = CASES[name]
    operands = [x.to(device) for x in case.operands(shape[0], shape[1], shape[3], shape[4])]
    given = [x.to(device, dtype) for x in heads(*shape)]
    program = case.program(scale)
    exact = _run(given, operands, program, torch.float64, None, drop)
    weights = torch.randn(exact[0].shape, device=device).to(dtype)
    weights = weights.masked_fill(exact[0].isnan(), 0.0)
    defined = not bool(exact[0].isnan().any())
    of_lse = torch.randn(exact[0].shape[:3], device=device) if by_rows else None
    exact = _run(given, operands, program, torch.float64, weights, drop, of_lse)
    eager = _run(given, operands, program, dtype, weights, drop, of_lse)
    ours = _templates(given, operands, program, dtype, weights, tiles, gradients, drop, of_lse)
    found = []
    for place, (true, theirs, one) in enumerate(zip(exact, eager, ours, strict=False)):
        if not defined and place:
            continue  # eager's gradients are NaN altogether
        assert one.dtype == dtype
        if not torch.equal(one.isnan(), true.isnan()):
            found.append(f"result {place}: NaN where there should be none, or none where there")
            continue
        errors = [(x.double() - true).nan_to_num().abs().max().item() for x in (theirs, one)]
        rounding = max(1e-5, 1e-6 * true.nan_to_num().abs().max().item())
        if not errors[1] <= (3 if place else 2) * errors[0] + rounding:
            found.append(f"result {place}: error {errors[1]:.3g}, eager's {errors[0]:.3g}")
    return found


def some_slow(names: Iterable[str], fast: set[str]) -> list[Any]:
    """The names as parameters, all but the ``fast`` ones marked slow."""
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


def in_parts(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the keys of few queries be read in so many parts."""

    def split(sizes: tuple[int, ...], *device: object) -> tuple[Tile, int]:
        return tile(Decode(*sizes)), parts

    monkeypatch.setattr(attention_decode, "_split", split)
    monkeypatch.setattr(attention_form, "_forms", {})  # they have kept their own split


def _run(
    given: list[Tensor],
    operands: list[Tensor],
    program: object,
    dtype: torch.dtype,
    weights: Tensor | None,
    drop: dict[str, Any],
    of_lse: Tensor | None = None,
) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in given]
    learned = _learned(operands, dtype)
    out, lse = reference_rows(*leaves, program, learned, **drop)  # type: ignore[arg-type]
    if weights is None:
        return [out]
    wanted = [*leaves, *(x for x in learned if x.requires_grad)]
    loss = (out * weights.to(dtype)).sum()
    if of_lse is not None:
        loss = loss + (lse * of_lse.to(dtype)).sum()
    return [out, *torch.autograd.grad(loss, wanted)]


def _templates(
    given: list[Tensor],
    operands: list[Tensor],
    program: object,
    dtype: torch.dtype,
    weights: Tensor,
    tiles: Row | None,
    gradients: bool,
    drop: dict[str, Any],
    of_lse: Tensor | None,
) -> list[Tensor]:
    learned = [x.detach() for x in _learned(operands, dtype)]
    problem = Problem(*given, program, tuple(learned), (), tiles, **drop)  # type: ignore[arg-type]
    query, value = given[0], given[2]
    batch, heads, rows, _ = query.shape
    out = query.new_empty((batch, rows, heads, value.shape[3])).transpose(1, 2)
    lse = attention.forward(problem, out)
    if not gradients:
        return [out]
    results = [torch.empty_like(x) for x in given]
    of_lse = None if of_lse is None else of_lse / math.log2(math.e)  # of one to the base of 2
    attention.backward(problem, weights, out, lse, of_lse, results)
    for which, each in enumerate(learned):
        if each.is_floating_point():
            given_rows = (weights, out, lse, of_lse)
            results.append(attention_operands.operand_gradient(problem, *given_rows, which))
    return [out, *results]


def _learned(operands: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in operands]
