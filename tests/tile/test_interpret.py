"""The reference interpreter against the same computation in plain torch and float64."""

from __future__ import annotations

import pytest
import torch

from iocompiler.tile.index import Affine, Axis
from iocompiler.tile.interpret import run
from iocompiler.tile.program import Buffer, Builder
from tests.codegen.cases import CASES
from tests.codegen.checks import assert_results


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    case = CASES[name]
    buffers = case.buffers()
    before = {n: t.clone() for n, t in buffers.items()}
    run(case.program, buffers, case.sizes, case.schedules[0])
    assert_results(case, before, buffers, case.schedules[0])


def test_partial_rows_beside_the_first_are_neutral() -> None:
    case = CASES["norm backward"]
    buffers = case.buffers()
    run(case.program, buffers, {}, case.schedules[0])
    assert not buffers["dw"].view(3, 10)[1:].any()


@pytest.mark.parametrize("start", [-1, 3])
def test_an_access_outside_its_buffer_is_an_error(start: int) -> None:
    build = Builder()
    build.store("out", Affine.of("x0"), build.load("a", Affine.of("x0") + start, torch.float32))
    buffers = (Buffer("a", torch.float32, "in", 4), Buffer("out", torch.float32, "out", 4))
    program = build.program((Axis("x0", 4),), (), buffers)
    with pytest.raises(IndexError):
        run(program, {"a": torch.zeros(4), "out": torch.zeros(4)}, {})
