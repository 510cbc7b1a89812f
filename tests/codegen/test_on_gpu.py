"""The hand-written programs, compiled and run on a CUDA device."""

from __future__ import annotations

import pytest

from iocompiler.plan.data import Schedule
from tests.codegen.cases import CASES
from tests.codegen.checks import assert_results
from tests.codegen.kernels import run_kernel

RUNS = [
    pytest.param(name, schedule, id=f"{name}-{schedule.kind}-{schedule.x_block}x{schedule.r_block}")
    for name, case in CASES.items()
    for schedule in case.schedules
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "schedule"), RUNS)
def test_case(name: str, schedule: Schedule) -> None:
    case = CASES[name]
    buffers = case.buffers()
    before = {n: t.clone() for n, t in buffers.items()}
    scalars = {b.name for b in case.program.buffers if b.role == "scalar"}
    device = {n: t if n in scalars else t.cuda() for n, t in buffers.items()}
    run_kernel(case.program, device, case.sizes, schedule)
    assert_results(case, before, {n: t.cpu() for n, t in device.items()}, schedule)
