"""Every hand-written program compiles with no GPU, and its resources are plausible."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from iocompiler.codegen.signature import signature
from iocompiler.plan.data import Schedule
from iocompiler.tile.index import Affine, Axis
from iocompiler.tile.program import Buffer, Builder, TileProgram
from tests.codegen.cases import CASES
from tests.codegen.compiling import compiled, instructions
from tests.codegen.programs import BF16, F32, R0, X0, X1, axes, ins, outs
from tests.plan.graphs import Planned

RUNS = [
    pytest.param(name, schedule, id=f"{name}-{schedule.kind}-{schedule.x_block}x{schedule.r_block}")
    for name, case in CASES.items()
    for schedule in case.schedules[:: max(1, len(case.schedules) - 1)]
]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize(("name", "schedule"), RUNS)
def test_case(name: str, schedule: Schedule, capability: int) -> None:
    built = compiled(CASES[name].program, schedule, capability)
    assert built.cubin
    assert built.metadata["spills"] == 0
    assert 0 < built.metadata["registers"] <= 255


@pytest.mark.slow
def test_a_row_that_is_read_again_does_not_spill() -> None:
    """A layer norm's backward at 16384 columns: both sums down the columns, in 128 registers."""
    planned = Planned()
    x, w, b = (torch.randn(*shape, 16384, dtype=BF16) for shape in ((4,), (), ()))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    planned(lambda x, w, b: F.layer_norm(x, (16384,), w, b))(*leaves).sum().backward()
    (walk,) = (s for s in planned.kernels if s.schedule.kind == "rows")
    assert walk.schedule.num_warps == 16
    built = compiled(walk.program, walk.schedule)
    assert built.metadata["spills"] == 0
    # of 32 elements a thread of three tensors, 8 at once, and again after the reductions
    loads = [line for line in instructions(built).splitlines() if "LDG.E" in line]
    assert sum(".128" in line for line in loads) == 2 * 3 * 32 // 8


def test_aligned_rows_are_read_sixteen_bytes_at_once() -> None:
    # one warp, 1024 elements: 32 to a thread; no mask, which could cut a vector in two
    build, x = Builder(), Affine.of("x0")
    build.store("out", x, build.load("a", x, torch.float32))
    buffers = (Buffer("a", torch.float32, "in", 4096), Buffer("out", torch.float32, "out", 4096))
    program = build.program((Axis("x0", 4096),), (), buffers)
    schedule = Schedule("pointwise", x_block=1024, num_warps=1)
    assert "LDG.E.128" in instructions(compiled(program, schedule))
    assert "LDG.E.128" not in instructions(compiled(program, schedule, aligned=()))


def test_signature() -> None:
    assert (
        signature(CASES["in place"].program, {"a"}, ()) == "a_ptr:*fp32:16 factor:fp32 b_ptr:*fp32"
    )
    any_size = signature(CASES["softmax, any size"].program, (), {"s0"})
    assert any_size.split()[-2:] == ["s0:i32:16", "s1:i64:16"]
    assert signature(CASES["bool"].program, (), ()).startswith("a_ptr:*i1 ")


def test_a_round_of_random_numbers_is_one_multiplication() -> None:
    build, x = Builder(), Affine.of("x0")
    seed = build.load("seed", Affine(), torch.int64)
    build.store("out", x, build.rand(seed, x))
    buffers = (Buffer("seed", torch.int64, "in", 1), Buffer("out", torch.float32, "out", 4096))
    program = build.program((Axis("x0", 4096),), (), buffers)
    schedule = Schedule("pointwise", x_block=128, num_warps=4)  # one number to a thread
    text = instructions(compiled(program, schedule))
    # seven rounds, and one for the address if not a shift
    assert 7 <= len(re.findall(r"\bIMAD\.(?:WIDE|HI)", text)) <= 8


def dropped(width: int) -> TileProgram:
    """out = a where a random number reaches 0.1, plus a weight of the column: two axes."""
    build, at = Builder(), X0 * width + X1
    draw = build.rand(build.load("seed", Affine(), torch.int64), at)
    kept = build.map("ge", draw, build.const(0.1, F32), dtype=torch.bool)
    value = build.map("add", build.load("a", at, F32), build.load("w", X1, F32))
    build.store("out", at, build.map("where", kept, value, build.const(0.0, F32)))
    buffers = ins(seed=(torch.int64, 1), a=(F32, 512 * width), w=(F32, width))
    return build.program(axes(512, width), (), buffers + outs(out=(F32, 512 * width)))


@pytest.mark.parametrize("width", [768, 1024])
def test_four_elements_share_a_block_of_random_numbers(width: int) -> None:
    # eight to a thread: two blocks of seven rounds
    schedule = Schedule("pointwise", x_block=1024, num_warps=4)
    text = instructions(compiled(dropped(width), schedule))
    assert 14 <= len(re.findall(r"\bIMAD\.(?:WIDE|HI)", text)) <= 20  # and a few addresses
    assert "I2F" not in text  # bits are compared as they are


def test_positions_of_two_axes_are_one_address() -> None:
    """Vectors are whole though the rows are no multiple of one."""
    schedule = Schedule("pointwise", x_block=1024, num_warps=4)
    text = instructions(compiled(dropped(6), schedule))
    assert "STG.E.128" in text
    assert "LDG.E.128" in text


def test_registers_are_bounded() -> None:
    program = CASES["softmax"].program
    free = Schedule("persistent", x_block=64, r_block=16, num_warps=1)
    bounded = replace(free, registers=32)
    assert compiled(program, free).metadata["registers"] > 32
    assert compiled(program, bounded).metadata["registers"] <= 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["persistent", "looped"])
def test_a_maximum_is_subtracted_from_the_number_it_was_taken_of(
    kind: str, dtype: torch.dtype
) -> None:
    """A product less the maximum of products is no multiply-add: 0 at the maximum."""
    build = Builder()
    at = X0 * 1024 + R0
    x = build.map("mul", build.load("a", at, dtype), build.load("b", at, dtype))
    build.store("out", at, build.map("sub", x, build.reduce("max", x, dtype)))
    buffers = ins(a=(dtype, 1 << 16), b=(dtype, 1 << 16)) + outs(out=(dtype, 1 << 16))
    program = build.program(axes(64), axes(1024, reduced=True), buffers)
    schedule = Schedule(kind, x_block=1, r_block=1024 if kind == "persistent" else 256, num_warps=4)  # type: ignore[arg-type]
    text = instructions(compiled(program, schedule))
    assert re.search(r"\b[FD]MUL\b", text)
    assert not re.search(r"\b[FD]FMA\b", text)
