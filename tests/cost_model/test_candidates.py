"""Candidates: near the choice, of every way to hold a row that is legal, few."""

from __future__ import annotations

from dataclasses import replace

import pytest

from iocompiler.cost_model.candidates import MOST, candidates
from iocompiler.cost_model.device import DEVICES
from iocompiler.cost_model.schedule import choose
from iocompiler.plan.data import Schedule
from iocompiler.tile.flat import LENGTH
from iocompiler.tile.program import Buffer, TileProgram
from tests.codegen.cases import CASES
from tests.codegen.programs import BF16, rows, softmax
from tests.cost_model.test_schedule import columns, is_legal
from tests.runtime.plans import binary

H200 = DEVICES["h200"]


def row_softmax(height: int, width: int) -> TileProgram:
    return rows(softmax, softmax, (height, width), (), BF16).program  # type: ignore[arg-type]


def kinds(found: list[Schedule]) -> set[str]:
    return {schedule.kind for schedule in found}


@pytest.mark.parametrize("name", CASES)
def test_distinct_few_and_the_choice_first(name: str) -> None:
    program = CASES[name].program
    found = candidates(program, H200)
    assert found[0] == choose(program, H200)
    assert len(set(found)) == len(found) <= MOST
    assert all(is_legal(program, schedule) for schedule in found)


@pytest.mark.parametrize("width", [4096, 16384])
def test_rows_are_held_and_walked(width: int) -> None:
    assert kinds(candidates(row_softmax(8192, width), H200)) == {"persistent", "looped", "rows"}


def test_few_rows_are_not_walked_by_one_program() -> None:
    assert "rows" not in kinds(candidates(row_softmax(64, 4096), H200))


def test_what_is_written_in_place_is_not_read_again() -> None:
    program = row_softmax(8192, 4096)
    names = {op.buffer for op in program.ops if op.kind == "load"}
    (name,) = names
    one = Buffer(name, BF16, "inout", 8192 * 4096)
    ops = tuple(replace(op, buffer=name) if op.buffer else op for op in program.ops)
    in_place = replace(program, buffers=(one,), ops=ops)
    assert kinds(candidates(in_place, H200)) == {"persistent"}


def test_a_walk_over_rows_has_several_counts_of_programs() -> None:
    first = Schedule("rows", x_block=1, r_block=4096, num_warps=8, programs=264)
    found = candidates(row_softmax(8192, 4096), H200, first=first, most=24)
    assert {s.programs for s in found if s.kind == "rows"} >= {264, 528}


def test_a_walk_with_loads_in_flight_has_more_of_them_and_fewer_rows() -> None:
    """Which is as many bytes in flight: what a thread holds is less."""
    first = Schedule("rows", x_block=4, r_block=1024, num_warps=4, num_stages=3, programs=264)
    found = candidates(row_softmax(4096, 1024), H200, first=first, most=24)
    assert replace(first, x_block=2, num_stages=4) in found
    plain = candidates(row_softmax(4096, 1024), H200, first=replace(first, num_stages=2), most=24)
    assert {s.num_stages for s in plain if s.kind == "rows"} == {2}


def test_many_tensors_are_walked_by_few_programs_where_there_is_enough_to_walk() -> None:
    program = binary("add", LENGTH)
    found = candidates(program, H200, {LENGTH.name: 1 << 27})
    assert found[0] == choose(program, H200, {LENGTH.name: 1 << 27})
    assert [s.programs > 0 for s in found] == [False] * (MOST - 1) + [True]
    assert replace(found[0], registers=64) in found
    everything = candidates(program, H200, {LENGTH.name: 1 << 27}, most=200)
    assert len({s.programs for s in everything}) == 4
    for points in (1 << 12, 1 << 20):
        few = candidates(program, H200, {LENGTH.name: points}, most=200)
        assert {s.programs for s in few} == {0}


def test_points_of_one_tensor_are_not_walked() -> None:
    found = candidates(binary("add", 1 << 27), H200, most=200)
    assert {(s.programs, s.registers) for s in found} == {(0, 0)}


def test_a_column_sum_never_reads_single_elements() -> None:
    found = candidates(columns(8192, 1024), H200, most=100)
    assert len(found) > 20
    assert min(schedule.x_block for schedule in found) >= 8


def test_any_width_is_walked_only() -> None:
    program = CASES["softmax, any size"].program
    assert kinds(candidates(program, H200, {"s0": 64, "s1": 64})) == {"looped"}


def test_a_thread_holds_no_more_than_its_registers() -> None:
    for schedule in candidates(row_softmax(8192, 16384), H200, most=100)[1:]:
        if schedule.kind != "looped":
            assert schedule.x_block * schedule.r_block <= 320 * 32 * schedule.num_warps
