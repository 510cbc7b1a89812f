"""Which programs ignore shape, and are one program for every size."""

from __future__ import annotations

from dataclasses import replace

import torch

from iocompiler.tile.flat import LENGTH, PARTS, Fold, flat_program, folds, without
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


def column_sums(
    shape: tuple[int, ...],
    parts: int,
    results: int = 1,
    fn: str = "sum",
    stride: int = 0,
    shares: bool = False,
) -> TileProgram:
    """``results`` bfloat16 tensors, each folded from ``parts`` rows; together with what they share
    in one more.
    """
    axes = tuple(Axis(f"x{i}", n) for i, n in enumerate(shape))
    points = 1
    for n in shape:
        points *= n
    build, buffers, made = Builder(), [], []
    rows = row_major(axes) + Affine.of("r0") * (stride or points)
    for number in range(results):
        total = build.reduce(fn, build.load(f"in{number}", rows, torch.float32), torch.float32)
        build.store(f"out{number}", row_major(axes), build.cast(total, torch.bfloat16))
        buffers.append(Buffer(f"in{number}", torch.float32, "in", points * parts))
        made.append(Buffer(f"out{number}", torch.bfloat16, "out", points))
        if shares:
            build.store("twice", row_major(axes), build.map("add", total, total))
            made.append(Buffer("twice", torch.float32, "out", points))
    return build.program(axes, (Axis("r0", parts),), tuple(buffers + made))


def test_folds_of_every_shape_are_one() -> None:
    found = [folds(column_sums(*case)) for case in [((6,), 3), ((2, 3), 7), ((), 5), ((4,), 1)]]
    assert [[(f.length, f.parts) for f in each] for each in found] == [
        [(6, 3)],
        [(6, 7)],
        [(1, 5)],
        [(4, 1)],
    ]
    (program,) = {f.program for each in found for f in each}
    assert program.parallel == (Axis("x0", LENGTH),)
    assert program.reduced == (Axis("r0", PARTS),)
    assert [b.elements for b in program.buffers] == [LENGTH * PARTS, LENGTH]


def test_results_that_share_nothing_are_folds_of_their_own() -> None:
    program = column_sums((6,), 3, results=3)
    found = folds(program)
    assert [fold.buffers for fold in found] == [(f"in{n}", f"out{n}") for n in range(3)]
    assert len({fold.program for fold in found}) == 1
    rest = without(program, (*found[0].stores, *found[2].stores))
    assert [b.name for b in rest.buffers] == ["in1", "out1"]
    assert folds(rest) == (Fold(found[1].program, 6, 3, ("in1", "out1"), (3,)),)


def test_results_of_one_reduction_stay_together() -> None:
    (fold,) = folds(column_sums((6,), 3, shares=True))
    assert fold.buffers == ("in0", "out0", "twice")


def test_results_that_read_the_same_rows_stay_together() -> None:
    """Else they would be read twice."""
    program = column_sums((6,), 3, results=2)
    ops = [replace(op, buffer="in0") if op.buffer == "in1" else op for op in program.ops]
    ops[5] = replace(ops[5], inputs=(0,), fn="max")
    (fold,) = folds(without(replace(program, ops=tuple(ops)), ()))
    assert fold.buffers == ("in0", "out0", "out1")


def test_what_is_no_fold() -> None:
    assert not folds(scaled((6,)))
    assert not folds(column_sums((6,), 3, stride=7))  # rows with room between them
    program = column_sums((6,), 3)
    transposed = tuple(
        replace(op, index=Affine.of("x0") * 3 + Affine.of("r0")) if op.kind == "load" else op
        for op in program.ops
    )
    assert not folds(replace(program, ops=transposed))
    masked = tuple(replace(op, fn="argmax") if op.kind == "reduce" else op for op in program.ops)
    assert not folds(replace(program, ops=masked))
