"""Kernels over many sets of tensors, run by Triton's interpreter through the table they read."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.backend import Compiler
from iocompiler.codegen.batch import UNIT, numbers_of
from iocompiler.codegen.module import emit_module
from iocompiler.plan import folds as plan_folds
from iocompiler.plan.data import BatchStep, Plan, Schedule
from iocompiler.runtime.batch import BatchLaunch, Row
from iocompiler.runtime.load import load_text
from iocompiler.tile.flat import flat_program, folds
from iocompiler.tile.index import Affine, Axis
from iocompiler.tile.program import Buffer, Builder, TileProgram
from tests.codegen.kernels import batch_kernel_of
from tests.runtime.text_engine import bind
from tests.tile.test_flat import column_sums, scaled


def launch(program: TileProgram, schedule: Schedule, rows: list[Row], unit: int = 1) -> None:
    kernel = batch_kernel_of(program, schedule)

    def run(stream: int, x: int, y: int, z: int, table: int, blocks: int, aligned: int) -> None:
        (kept,) = batch._kept.values()
        assert (table, blocks) == (kept.table.data_ptr(), kept.blocks.data_ptr())
        kernel[x, y, z](kept.table, kept.blocks, aligned)

    cpu = torch.device("cpu")
    numbers, programs = numbers_of(program), schedule.programs
    batch = BatchLaunch(lambda: run, schedule.x_block, numbers, cpu, unit, programs)
    batch(0, rows)


@pytest.mark.parametrize("programs", [0, 1, 3, 100])
@pytest.mark.parametrize("lengths", [(16, 48), (16, 5, 33), (1,)])
def test_pointwise(lengths: tuple[int, ...], programs: int) -> None:
    found = flat_program(scaled((8,)))
    assert found is not None
    members = [(torch.randn(n), torch.randn(1), torch.full((n,), torch.nan)) for n in lengths]
    launch(
        found[0],
        Schedule("pointwise", x_block=16, programs=programs),
        [(*(t.data_ptr() for t in m), m[0].numel()) for m in members],
    )
    for x, s, out in members:
        torch.testing.assert_close(out, x * s)


def test_each_block_is_worked_on_once() -> None:
    """What stands in place would be another number the second time."""
    found = flat_program(in_place())
    assert found is not None
    members = [torch.arange(n, dtype=torch.float32) for n in (5, 40, 16)]
    rows: list[Row] = [(t.data_ptr(), t.numel()) for t in members]
    launch(found[0], Schedule("pointwise", x_block=16, programs=2), rows)
    for tensor in members:
        torch.testing.assert_close(tensor, 2.0 * torch.arange(len(tensor)))


def in_place() -> TileProgram:
    """``a = a + a``."""
    build, at = Builder(), Affine.of("x0")
    value = build.load("a", at, torch.float32)
    build.store("a", at, build.map("add", value, value))
    return build.program((Axis("x0", 8),), (), (Buffer("a", torch.float32, "inout", 8),))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of NaN, which is meant
@pytest.mark.filterwarnings(
    "ignore:Conversion of an array:DeprecationWarning"
)  # Triton's interpreter in loops
@pytest.mark.parametrize(
    "sizes",
    [
        [(16, 8), (48, 3)],  # all aligned: whole blocks without a mask
        [(16, 9), (5, 4), (33, 1)],
        [(1, 7)],
    ],
)
@pytest.mark.parametrize("kinds", ["sum", "max"])
def test_folds(sizes: list[tuple[int, int]], kinds: str) -> None:
    fold = folds(column_sums((8,), 4, fn=kinds))[0]
    half = partial(torch.empty, dtype=torch.bfloat16)
    members = [(torch.randn(p, n), half(n).fill_(torch.nan)) for n, p in sizes]
    for rows, _ in members:
        rows[0, 0] = torch.inf
        rows[-1, -1] = torch.nan
    schedule = Schedule("looped", x_block=16, r_block=4)
    launch(
        fold.program,
        schedule,
        [
            (rows.data_ptr(), out.data_ptr(), p, n)
            for (rows, out), (n, p) in zip(members, sizes, strict=True)
        ],
        UNIT,
    )
    for rows, out in members:
        expected = rows.sum(0) if kinds == "sum" else rows.amax(0)
        torch.testing.assert_close(out, expected.to(out.dtype), equal_nan=True)


class Layers(nn.Module):
    """Norms of two widths, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in (8, 8, 5))
        self.linears = nn.ModuleList(nn.Linear(8, width) for width in (8, 5))

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.norms
        up, down = self.linears
        result: Tensor = last(down(torch.relu(second(up(torch.relu(first(x)))))))
        return result


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_a_backward_as_it_is_emitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_folds, "SHARE", 1)
    plans: list[Plan] = []

    def engine(plan: Plan, gm: GraphModule) -> Callable[[list[Any]], Any]:
        plans.append(plan)
        text = emit_module(plan, "graph")
        return load_text(text, "graph", "cpu", lambda spec: bind(text, spec))

    module, x, weight = Layers(), torch.randn(6, 8), torch.randn(6, 5)
    run = torch.compile(module, backend=Compiler(engine=engine, strict=True))
    parameters = list(module.parameters())
    for _ in range(2):  # the second time at other addresses
        got = torch.autograd.grad((run(x) * weight).sum(), parameters)
        want = torch.autograd.grad((module(x) * weight).sum(), parameters)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    (step,) = (s for s in plans[-1].steps if isinstance(s, BatchStep))
    assert len(step.members) >= 6
