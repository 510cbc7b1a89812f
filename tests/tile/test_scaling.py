"""Products of a tensor with one number."""

from __future__ import annotations

import pytest
import torch

from iocompiler.tile.index import Affine
from iocompiler.tile.program import Buffer, Builder, TileProgram
from iocompiler.tile.scaling import Scaling, scaling
from tests.codegen.programs import BF16, F16, F32, F64, X0, axes, ins, outs

NUMBER = Affine()


def product(
    held: torch.dtype = BF16,
    inside: torch.dtype = F32,
    written: torch.dtype = BF16,
    number: torch.dtype = F32,
    fn: str = "mul",
    source: Affine = X0,
    factor: Affine = NUMBER,
    turned: bool = False,
) -> TileProgram:
    build = Builder()
    one = build.cast(build.load("a", source, held), inside)
    other = build.cast(build.load("s", factor, number), inside)
    made = build.map(fn, *((other, one) if turned else (one, other)))
    build.store("out", X0, build.cast(made, written))
    return build.program(axes(8), (), ins(a=(held, 9), s=(number, 9)) + outs(out=(written, 8)))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_taken(dtype: torch.dtype, turned: bool) -> None:
    found = scaling(product(dtype, F32, dtype, turned=turned))
    assert found == Scaling("a", "s", "out", 0)


def test_an_element_behind_the_pointer() -> None:
    assert scaling(product(factor=Affine((), 3))) == Scaling("a", "s", "out", 3)


@pytest.mark.parametrize(
    "program",
    [
        product(fn="add"),
        product(written=F32),
        product(source=X0 + 1),
        product(factor=X0),
        product(F32, BF16, F32),  # rounded on the way
        product(F16, BF16, F16),
        product(F64, F32, F64),
    ],
)
def test_declined(program: TileProgram) -> None:
    assert scaling(program) is None


def test_more_than_a_product() -> None:
    build = Builder()
    made = build.map("mul", build.load("a", X0, F32), build.load("s", NUMBER, F32))
    build.store("out", X0, build.map("add", made, made))
    buffers = ins(a=(F32, 8), s=(F32, 1)) + outs(out=(F32, 8))
    assert scaling(build.program(axes(8), (), buffers)) is None


def test_a_number_passed_by_value() -> None:
    build = Builder()
    build.store("out", X0, build.map("mul", build.load("a", X0, F32), build.load("s", NUMBER, F32)))
    buffers = (*ins(a=(F32, 8)), Buffer("s", F32, "scalar", 1), *outs(out=(F32, 8)))
    assert scaling(build.program(axes(8), (), buffers)) is None
