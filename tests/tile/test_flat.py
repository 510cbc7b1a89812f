"""Which pointwise programs ignore shape, and are one program for every size."""

from __future__ import annotations

import torch

from iocompiler.tile.flat import LENGTH, flat_program
from iocompiler.tile.index import Affine, Axis, row_major
from iocompiler.tile.program import Buffer, Builder, TileProgram


def scaled(
    shape: tuple[int, ...], index: Affine | None = None, reads_place: bool = False
) -> TileProgram:
    """out = x * s over ``shape``, with ``s`` one element."""
    axes = tuple(Axis(f"x{i}", n) for i, n in enumerate(shape))
    points = 1
    for n in shape:
        points *= n
    build = Builder()
    x = build.load("x", index or row_major(axes), torch.float32)
    s = build.load("s", Affine(), torch.float32)
    value = build.map("mul", x, s)
    if reads_place:
        value = build.map("add", value, build.cast(build.iota(Affine.of("x0")), torch.float32))
    build.store("out", row_major(axes), value)
    buffers = tuple(
        Buffer(n, torch.float32, r, e)
        for n, r, e in (("x", "in", points), ("s", "in", 1), ("out", "out", points))
    )
    return build.program(axes, (), buffers)


def test_programs_of_every_shape_are_one() -> None:
    found = [flat_program(scaled(shape)) for shape in [(6,), (2, 3), (4, 5, 7)]]
    assert all(f is not None for f in found)
    assert [f[1] for f in found if f] == [6, 6, 140]
    assert len({f[0] for f in found if f}) == 1
    assert found[0] is not None
    assert found[0][0].parallel == (Axis("x0", LENGTH),)


def test_an_element_that_knows_its_place_is_not_flat() -> None:
    assert flat_program(scaled((4, 5), reads_place=True)) is None


def test_a_transposed_operand_is_not_flat() -> None:
    assert flat_program(scaled((4, 5), Affine.of("x0") + Affine.of("x1") * 4)) is None


def test_a_slice_of_a_larger_tensor_is_not_flat() -> None:
    assert flat_program(scaled((4, 5), row_major((Axis("x0", 4), Axis("x1", 5))) + 3)) is None
