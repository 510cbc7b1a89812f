"""Schedules: legal for every program; where it matters, what a person would choose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from iocompiler.codegen.triton import emit, grid
from iocompiler.cost_model.candidates import candidates
from iocompiler.cost_model.device import DEVICES
from iocompiler.cost_model.schedule import choose, split_factor
from iocompiler.cost_model.tiles import REGISTERS
from iocompiler.plan.data import Schedule
from iocompiler.tile.index import Affine
from iocompiler.tile.program import Builder, TileProgram
from tests.codegen.cases import CASES
from tests.codegen.programs import BF16, F32, R0, X0, X1, axes, fold, ins, outs, rows, softmax

H200 = DEVICES["h200"]
MOST_IN_A_TILE = 1 << 20  # Triton's own limit


def is_legal(program: TileProgram, schedule: Schedule) -> bool:
    blocks = (schedule.x_block, schedule.y_block, schedule.r_block)
    powers = all(b >= 1 and b & (b - 1) == 0 for b in (*blocks, schedule.num_warps))
    covers = True
    if schedule.kind in ("persistent", "rows"):
        extent = 1
        for axis in program.reduced:
            extent = extent * axis.size
        covers = isinstance(extent, int) and extent <= schedule.r_block
    small = blocks[0] * blocks[1] * blocks[2] <= MOST_IN_A_TILE
    return powers and covers and small and schedule.num_warps <= 32


@pytest.mark.parametrize("device", ["h200", "a100", "rtx4090"])
@pytest.mark.parametrize("name", CASES)
def test_every_choice_is_legal(name: str, device: str) -> None:
    program = CASES[name].program
    for schedule in [choose(program, DEVICES[device]), *candidates(program, DEVICES[device])]:
        assert is_legal(program, schedule), schedule
        if schedule.kind != "rows" or all(op.fn != "partial" for op in program.ops):
            assert "@triton.jit" in emit(program, schedule, "kernel")
            assert len(grid(program, schedule)) == 3


@pytest.mark.parametrize("hint", [1, 3, 1000, 10**6])
def test_hints_steer_but_never_make_a_schedule_wrong(hint: int) -> None:
    program = CASES["softmax, any size"].program
    schedule = choose(program, H200, {"s0": hint, "s1": hint})
    assert is_legal(program, schedule)
    assert schedule.kind == "looped"


def row_softmax(width: int) -> TileProgram:
    return rows(softmax, softmax, (8192, width), (), BF16).program  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [64, 768, 1024, 4096, 16384])
def test_rows_that_fit_are_read_once(width: int) -> None:
    schedule = choose(row_softmax(width), H200)
    assert schedule.kind == "persistent"
    assert (
        schedule.x_block * schedule.r_block // (32 * schedule.num_warps) <= 64
    )  # elements a thread holds


def weighted(width: int, own: int = 1) -> TileProgram:
    """A row, or a sum of several, less its mean, times a weight and plus a bias of each column."""
    build, at = Builder(), X0 * width + R0
    x = build.cast(build.load("a0", at, BF16), F32)
    for i in range(1, own):
        x = build.map("add", x, build.cast(build.load(f"a{i}", at, BF16), F32))
    x = build.map("sub", x, build.reduce("sum", x, F32))
    columns = {f"w{i}": (BF16, width) for i in range(own + 1)}
    for name in columns:
        x = build.map("mul", x, build.cast(build.load(name, R0, BF16), F32))
    build.store("out", at, build.cast(x, BF16))
    buffers = ins(**{f"a{i}": (BF16, 8192 * width) for i in range(own)}, **columns)
    outputs = outs(out=(BF16, 8192 * width))
    return build.program(axes(8192), axes(width, reduced=True), buffers + outputs)


@pytest.mark.parametrize(("width", "programs"), [(8192, 3), (16384, 2)])
def test_long_rows_with_weights_leave_registers_for_other_programs(
    width: int, programs: int
) -> None:
    schedule = choose(weighted(width), H200)
    assert schedule.kind == "persistent"
    threads = 32 * schedule.num_warps * programs
    assert schedule.registers * threads <= H200.registers_per_sm
    # and no fewer registers than that asks for
    assert (schedule.registers + 8) * threads > H200.registers_per_sm


def test_long_rows_that_leave_none_are_walked() -> None:
    assert choose(weighted(16384, own=4), H200).kind == "looped"
    assert choose(weighted(4096), H200).registers == 0


@pytest.mark.parametrize(("own", "registers"), [(2, 128), (4, 0)])
def test_long_rows_of_random_numbers_share_a_processor_where_they_fit(
    own: int, registers: int
) -> None:
    build, at = Builder(), X0 * 16384 + R0
    x = build.rand(build.load("seed", Affine(), torch.int64), at)
    for i in range(own):
        x = build.map("mul", x, build.cast(build.load(f"a{i}", at, BF16), F32))
    build.store("out", at, build.map("sub", x, build.reduce("sum", x, F32)))
    buffers = ins(seed=(torch.int64, 1), **{f"a{i}": (BF16, 1 << 27) for i in range(own)})
    outputs = outs(out=(F32, 1 << 27))
    program = build.program(axes(8192), axes(16384, reduced=True), buffers + outputs)
    schedule = choose(program, H200)
    assert (schedule.kind, schedule.num_warps) == ("persistent", 8)
    assert schedule.registers == registers


def test_neighbours_keep_as_many_programs_a_processor() -> None:
    first = choose(weighted(16384), H200)
    others = [s for s in candidates(weighted(16384), H200) if s.kind == first.kind]
    assert first.registers == 64
    assert {s.registers * s.num_warps for s in others} <= {0, first.registers * first.num_warps}
    assert any(s.registers == 0 for s in others)
    assert {s.registers for s in others} <= {0, *REGISTERS}


def test_rows_are_also_measured_with_no_loads_in_flight() -> None:
    program = with_column_sums(4096, BF16, 1)
    first = choose(program, H200)
    assert (first.kind, first.num_stages) == ("rows", 3)
    assert replace(first, num_stages=1) in candidates(program, H200)


def test_rows_that_do_not_fit_are_walked() -> None:
    assert choose(row_softmax(65536), H200).kind == "looped"


def test_small_rows_share_a_program() -> None:
    assert choose(row_softmax(32), H200).x_block >= 8


def columns(deep: int, wide: int) -> TileProgram:
    build = Builder()
    build.store("out", X0, build.reduce("sum", build.load("a", R0 * wide + X0, F32), F32))
    return build.program(
        axes(wide), axes(deep, reduced=True), ins(a=(F32, deep * wide)) + outs(out=(F32, wide))
    )


def test_a_column_sum_reads_whole_lines() -> None:
    # a warp reads along x: 32 floats are one line of 128 bytes
    assert choose(columns(8192, 1024), H200).x_block >= 32


@pytest.mark.parametrize("wide", [4096, 512])
def test_a_scan_across_memory_walks_lines(wide: int) -> None:
    build, at = Builder(), X0 + R0 * wide
    build.store("out", at, build.scan("cumsum", build.load("a", at, F32)))
    buffers = ins(a=(F32, 2048 * wide)) + outs(out=(F32, 2048 * wide))
    schedule = choose(build.program(axes(wide), axes(2048, reduced=True), buffers), H200)
    assert schedule.kind == "looped"
    assert 4 * schedule.x_block >= 64  # two sectors at least


def test_a_transpose_is_tiled_both_ways() -> None:
    build = Builder()
    build.store("out", X0 * 4096 + X1, build.load("a", X1 * 4096 + X0, F32))
    program = build.program(axes(4096, 4096), (), ins(a=(F32, 4096**2)) + outs(out=(F32, 4096**2)))
    schedule = choose(program, H200)
    assert min(schedule.x_block, schedule.y_block) >= 16


def test_a_copy_fills_the_device_and_reads_sixteen_bytes_a_thread() -> None:
    build, at = Builder(), Affine.of("x0")
    build.store("out", at, build.load("a", at, torch.bfloat16))
    program = build.program(axes(1 << 26), (), ins(a=(BF16, 1 << 26)) + outs(out=(BF16, 1 << 26)))
    schedule = choose(program, H200)
    assert 2 * schedule.x_block // (32 * schedule.num_warps) >= 16


def test_a_fold_of_one_element_is_no_pointwise_kernel() -> None:
    assert choose(CASES["one element"].program, H200).kind == "persistent"


def with_column_sums(width: int, dtype: torch.dtype, folds: int) -> TileProgram:
    """A gradient of rows: each element less its row's folds; the sums of the columns."""
    build, at = Builder(), X0 * width + R0
    x, dy = build.load("x", at, dtype), build.load("dy", at, dtype)
    value = build.map("mul", build.cast(x, F32), build.cast(dy, F32))
    for _ in range(folds):
        value = build.map("sub", value, build.reduce("sum", value, F32))
    build.store("dx", at, build.cast(value, dtype))
    build.store(
        "dw", R0, build.reduce("sum", build.cast(dy, F32), F32, over="parallel"), fn="partial"
    )
    buffers = ins(x=(dtype, 8192 * width), dy=(dtype, 8192 * width)) + outs(
        dx=(dtype, 8192 * width), dw=(F32, 264 * width)
    )
    return build.program(axes(8192), axes(width, reduced=True), buffers)


def test_rows_that_compute_much_are_half_as_many_at_once() -> None:
    """A norm's backward beside which dropout is drawn again."""
    build, at = Builder(), X0 * 1024 + R0
    x = build.cast(build.load("x", at, BF16), F32)
    for _ in range(12):
        x = build.map("mul", x, x)
    build.store("dw", R0, build.reduce("sum", x, F32, over="parallel"), fn="partial")
    buffers = ins(x=(BF16, 8192 * 1024)) + outs(dw=(F32, 264 * 1024))
    heavy = choose(build.program(axes(8192), axes(1024, reduced=True), buffers), H200)
    light = choose(with_column_sums(1024, BF16, 1), H200)
    assert (heavy.x_block, heavy.num_warps) == (2, 4)
    assert (light.x_block, light.num_warps) == (4, 4)


@pytest.mark.parametrize(
    ("width", "dtype", "folds", "stages"),
    [
        (4096, BF16, 1, 3),
        (4096, BF16, 2, 3),
        (16384, BF16, 1, 3),
        (16384, BF16, 2, 1),  # too few registers
        (16384, F32, 1, 1),  # too little shared memory
    ],
)
def test_rows_are_loaded_ahead_where_there_is_room(
    width: int, dtype: torch.dtype, folds: int, stages: int
) -> None:
    schedule = choose(with_column_sums(width, dtype, folds), H200)
    assert (schedule.kind, schedule.num_stages) == ("rows", stages)


@pytest.mark.parametrize(("count", "stages"), [(1, 2), (2, 3), (30, 2)])
def test_columns_are_loaded_ahead_where_there_is_room(count: int, stages: int) -> None:
    """A sum down the columns of ``count`` tensors: one needs nothing ahead, many do not fit."""
    build, at = Builder(), X0 + R0 * 4096
    value = build.load("a0", at, F32)
    for number in range(1, count):
        value = build.map("mul", value, build.load(f"a{number}", at, F32))
    build.store("sum", X0, build.reduce("sum", value, F32))
    given = {f"a{number}": (F32, 8192 * 4096) for number in range(count)}
    program = build.program(
        axes(4096), axes(8192, reduced=True), ins(**given) + outs(sum=(F32, 4096))
    )
    schedule = choose(program, H200)
    assert (schedule.kind, schedule.num_stages) == ("looped", stages)


def test_sums_with_little_parallelism_are_split() -> None:
    assert split_factor(columns(8192, 1024), H200) > 1
    whole = rows(fold("sum", F32), torch.sum, (1, 1 << 24), (), row_result=True)
    assert split_factor(whole.program, H200) > 1


def test_what_fills_the_device_or_is_small_is_not_split() -> None:
    assert (
        split_factor(
            rows(fold("sum", F32), torch.sum, (8192, 1024), (), row_result=True).program, H200
        )
        == 1
    )
    assert split_factor(columns(64, 64), H200) == 1
    assert split_factor(CASES["broadcasting"].program, H200) == 1
