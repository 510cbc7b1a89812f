"""Where 32 bits may not hold a position, it is computed in 64; where they do, it is not."""

from __future__ import annotations

import pytest

from iocompiler.codegen.triton import emit
from iocompiler.plan.data import Schedule
from iocompiler.tile.index import Affine, Size, product
from iocompiler.tile.program import Builder, TileProgram
from tests.codegen.cases import CASES
from tests.codegen.compiling import compiled
from tests.codegen.programs import F32, M, N, axes, ins, outs

SCHEDULE = Schedule("pointwise", x_block=128)


def copy(*sizes: Size) -> TileProgram:
    build, count = Builder(), product(list(sizes))
    build.store("out", Affine.of("x0"), build.load("a", Affine.of("x0"), F32))
    return build.program(axes(count), (), ins(a=(F32, count)) + outs(out=(F32, count)))


@pytest.mark.parametrize("sizes", [(2**31,), (N, M), (768, N)], ids=str)
def test_positions_that_may_pass_32_bits(sizes: tuple[Size, ...]) -> None:
    program = copy(*sizes)
    text = emit(program, SCHEDULE, "kernel")
    position = next(line for line in text.splitlines() if line.strip().startswith("x = "))
    assert ".to(tl.int64) *" in position, text
    assert compiled(program, SCHEDULE).cubin


@pytest.mark.parametrize("size", [1000, 2**30], ids=str)
def test_positions_known_to_fit_are_not_widened(size: int) -> None:
    assert "int64" not in emit(copy(size), SCHEDULE, "kernel")


def test_a_bound_that_is_a_product_of_sizes_is_wide() -> None:
    mask = next(s for s in emit(copy(N, M), SCHEDULE, "kernel").splitlines() if "x_mask =" in s)
    assert mask.count("tl.int64") == 2


def test_counters_past_32_bits() -> None:
    assert "int64" in emit(CASES["rand"].program, SCHEDULE, "kernel")
