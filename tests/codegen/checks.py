"""Holding what a kernel wrote against a `Case`'s own computation."""

from __future__ import annotations

import torch

from iocompiler.plan.data import Schedule
from tests.codegen.programs import Case


def assert_results(
    case: Case, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], schedule: Schedule
) -> None:
    """Every buffer the program writes holds what is expected, and no other buffer changed."""
    expected = case.expected(before)
    partial = {op.buffer for op in case.program.ops if op.fn == "partial"}
    for buffer in case.program.buffers:
        got = after[buffer.name]
        if buffer.name not in expected:
            same(got, before[buffer.name], f"{buffer.name} was only to be read")
            continue
        want = expected[buffer.name].reshape(-1)
        if buffer.name in partial:
            got = got.view(schedule.programs, -1).double().sum(0)
        if case.exact:
            same(got, want.to(got.dtype), buffer.name)
            continue
        tight = 1e-10 if got.dtype == torch.float64 and buffer.name not in partial else 2e-6
        rtol = 1e-2 if got.dtype == torch.bfloat16 else tight
        torch.testing.assert_close(
            got.double(), want.double(), rtol=rtol, atol=rtol, equal_nan=True
        )


def same(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """Equal to the last bit, NaN equal to NaN."""
    torch.testing.assert_close(
        got, want, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )
