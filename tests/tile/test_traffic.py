"""The byte count against counts made by hand."""

from __future__ import annotations

import pytest
import sympy
import torch

from iocompiler.tile.index import Affine, Axis
from iocompiler.tile.program import Buffer, Builder
from iocompiler.tile.traffic import traffic
from tests.codegen.cases import CASES
from tests.codegen.programs import BOOL, F32, I64, X0, N, axes, ins, number, outs

# name: bytes read, bytes written
BYTES = {
    "broadcasting": (4 * (91 + 13 + 7), 4 * 91),
    "transposed": (4 * 437, 4 * 437),
    "column sum": (4 * 407, 4 * 11),
    "softmax": (4 * 65, 4 * 65),
    "softmax bf16": (2 * 65, 2 * 65),
    "norm backward": (4 * (130 + 130 + 10), 4 * (130 + 30 + 30)),
    "cat": (4 * (5 + 6), 4 * 22),
    "gather": (8 * 7 + 2 * 30, 2 * 42),
    "in place": (4 * 20, 4 * 10),
    "bool": (90, 45 + 5),
    "no points": (0, 0),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes(name: str) -> None:
    moved = traffic(CASES[name].program)
    assert (moved.read_bytes, moved.written_bytes) == BYTES[name]


def test_symbolic_sizes_give_formulas() -> None:
    moved = traffic(CASES["softmax, any size"].program)
    m, n = (sympy.Symbol(s, integer=True, positive=True) for s in ("s1", "s0"))
    assert sympy.expand(moved.bytes - 8 * m * n) == 0


def test_two_reads_of_one_element_count_once_and_of_two_halves_twice() -> None:
    build = Builder()
    low, high = build.load("a", X0, F32), build.load("a", X0 + 8, F32)
    again = build.load(
        "a", X0, F32, build.map("lt", build.iota(X0), number(build, 5, I64), dtype=BOOL)
    )
    build.store("out", X0, build.map("add", build.map("add", low, high), again))
    program = build.program(axes(8), (), ins(a=(F32, 16)) + outs(out=(F32, 8)))
    assert traffic(program).read_bytes == 64


def test_numbers_passed_by_value_move_nothing() -> None:
    build = Builder()
    build.store("out", X0, build.load("factor", Affine(), F32))
    buffers = (Buffer("factor", F32, "scalar", 1), Buffer("out", F32, "out", N))
    moved = traffic(build.program((Axis("x0", N),), (), buffers))
    assert (moved.read_bytes, moved.written_bytes) == (0, 4 * N)


def test_work() -> None:
    build = Builder()
    a = build.load("a", X0, torch.float32)
    build.store("out", X0, build.map("mul", build.map("exp", a), a))
    moved = traffic(build.program(axes(10), (), ins(a=(F32, 10)) + outs(out=(F32, 10))))
    assert (moved.flops, moved.transcendentals) == (10, 10)
