"""The hand-written programs in Triton's interpreter; ``test_interpreted.py`` starts this."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.plan.data import Schedule
from tests.codegen.cases import CASES
from tests.codegen.checks import assert_results
from tests.codegen.kernels import run_kernel

RUNS = [
    pytest.param(name, schedule, id=f"{name}-{schedule.kind}-{schedule.x_block}x{schedule.r_block}")
    for name, case in CASES.items()
    for schedule in case.schedules
    if not case.libdevice  # libdevice has no interpreter
]


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy warns of NaN and of overflow, which are meant
@pytest.mark.filterwarnings(
    "ignore:Conversion of an array:DeprecationWarning"
)  # Triton's interpreter in loops
@pytest.mark.parametrize(("name", "schedule"), RUNS)
def test_case(name: str, schedule: Schedule) -> None:
    case = CASES[name]
    buffers = case.buffers()
    before = {n: t.clone() for n, t in buffers.items()}
    run_kernel(case.program, buffers, case.sizes, schedule)
    assert_results(case, before, buffers, schedule)


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("factor", [1.0, 0.37, float("nan")])
def test_a_product_over_its_operand(factor: float) -> None:
    case = CASES["scaled"]
    buffers = {**case.buffers(), "factor": torch.tensor([factor])}
    wanted = case.expected(buffers)["out"]
    buffers["out"] = buffers["a"]
    run_kernel(case.program, buffers, {}, case.schedules[0])
    torch.testing.assert_close(buffers["a"], wanted, rtol=0, atol=0, equal_nan=True)


def test_nothing_is_written_where_a_product_with_one_stands() -> None:
    """Its programs return before the loop, where they would fail: there is no such memory."""
    case = CASES["scaled"]
    nowhere = torch.empty(0, dtype=torch.float16)
    buffers = {"a": nowhere, "out": nowhere, "factor": torch.ones(1)}
    run_kernel(case.program, buffers, {}, case.schedules[0])
