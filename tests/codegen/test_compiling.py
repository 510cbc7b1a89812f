"""Every hand-written program compiles with no GPU, and its resources are plausible."""

from __future__ import annotations

import re

import pytest
import torch

from iocompiler.codegen.build import Built, compile_source, divisible, signature
from iocompiler.codegen.triton import emit
from iocompiler.plan.data import Schedule
from iocompiler.tile.index import Affine, Axis
from iocompiler.tile.program import Buffer, Builder
from tests.codegen.cases import CASES

RUNS = [
    pytest.param(name, schedule, id=f"{name}-{schedule.kind}-{schedule.x_block}x{schedule.r_block}")
    for name, case in CASES.items()
    for schedule in case.schedules[:: max(1, len(case.schedules) - 1)]
]


def build(name: str, schedule: Schedule, capability: tuple[int, int]) -> Built:
    program = CASES[name].program
    return compile_source(
        emit(program, schedule, "kernel"), "kernel", program, schedule, capability
    )


@pytest.mark.slow
@pytest.mark.parametrize("capability", [(9, 0), (8, 0)], ids=["sm_90", "sm_80"])
@pytest.mark.parametrize(("name", "schedule"), RUNS)
def test_case(name: str, schedule: Schedule, capability: tuple[int, int]) -> None:
    built = build(name, schedule, capability)
    assert built.cubin
    assert built.spills == 0
    assert 0 < built.registers <= 255


def test_aligned_rows_are_read_sixteen_bytes_at_once() -> None:
    # one warp, 1024 elements: 32 to a thread; no mask, which could cut a vector in two
    build, x = Builder(), Affine.of("x0")
    build.store("out", x, build.load("a", x, torch.float32))
    buffers = (Buffer("a", torch.float32, "in", 4096), Buffer("out", torch.float32, "out", 4096))
    program = build.program((Axis("x0", 4096),), (), buffers)
    schedule = Schedule("pointwise", x_block=1024, num_warps=1)
    source = emit(program, schedule, "kernel")
    assert ".v4" in compile_source(source, "kernel", program, schedule).ptx
    alone = compile_source(source, "kernel", program, schedule, aligned=frozenset())
    assert ".v4" not in alone.ptx


def test_signature() -> None:
    assert signature(CASES["in place"].program) == {
        "a_ptr": "*fp32",
        "factor": "fp32",
        "b_ptr": "*fp32",
    }
    any_size = signature(CASES["softmax, any size"].program)
    assert list(any_size.items())[-2:] == [("s0", "i32"), ("s1", "i32")]
    assert signature(CASES["bool"].program)["a_ptr"] == "*i1"


def test_divisible_leaves_out_numbers_and_views_off_the_grid() -> None:
    program = CASES["in place"].program
    assert divisible(program, frozenset({"a", "factor", "b"})) == (0, 2)
    assert divisible(program, frozenset({"b"})) == (2,)


def test_a_round_of_random_numbers_is_one_multiplication() -> None:
    build, x = Builder(), Affine.of("x0")
    seed = build.load("seed", Affine(), torch.int64)
    build.store("out", x, build.rand(seed, x))
    buffers = (Buffer("seed", torch.int64, "in", 1), Buffer("out", torch.float32, "out", 4096))
    program = build.program((Axis("x0", 4096),), (), buffers)
    schedule = Schedule("pointwise", x_block=128, num_warps=4)  # one number to a thread
    ptx = compile_source(emit(program, schedule, "kernel"), "kernel", program, schedule).ptx
    # seven rounds, and one for the address if not a shift
    assert 7 <= len(re.findall(r"\bmul\.(?:wide|lo|hi)\.", ptx)) <= 8
