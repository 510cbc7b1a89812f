"""Merging axes and cutting reductions: the programs made compute what the first one did."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from iocompiler.tile.arrange import merge_axes
from iocompiler.tile.index import Affine, Axis
from iocompiler.tile.interpret import run
from iocompiler.tile.online import levels
from iocompiler.tile.program import Builder, TileProgram
from iocompiler.tile.split import split_reduction
from tests.codegen.cases import CASES
from tests.codegen.checks import assert_results
from tests.codegen.programs import F32, X0, Case, axes, ins, outs, rows, softmax, variance
from tests.codegen.programs import logsumexp as guarded_logsumexp


@pytest.mark.parametrize("name", CASES)
def test_merged_axes_compute_the_same(name: str) -> None:
    case = CASES[name]
    buffers = case.buffers()
    before = {n: t.clone() for n, t in buffers.items()}
    run(merge_axes(case.program), buffers, case.sizes, case.schedules[0])
    assert_results(case, before, buffers, case.schedules[0])


def test_adjacent_axes_become_one() -> None:
    build, at = Builder(), Affine.build({"x0": 40, "x1": 8, "x2": 1, "x3": 5})
    build.store("out", at, build.load("a", at, F32))
    merged = merge_axes(
        build.program(axes(3, 5, 8, 1), (), ins(a=(F32, 120)) + outs(out=(F32, 120)))
    )
    assert merged.parallel == (Axis("x2", 120),)


def test_axes_an_access_tells_apart_stay() -> None:
    program = CASES["broadcasting"].program
    assert merge_axes(program).parallel == program.parallel


def copied(sizes: tuple[int, ...], *strides: tuple[int, ...]) -> TileProgram:
    """A load and stores, each with its strides; and a row that is broadcast."""
    build = Builder()
    indices = [
        Affine.build({f"x{place}": stride for place, stride in enumerate(each)}) for each in strides
    ]
    row = build.load("row", Affine.of(f"x{len(sizes) - 1}"), F32)
    value = build.map("add", build.load("a", indices[0], F32), row)
    for place, index in enumerate(indices[1:]):
        build.store(f"out{place}", index, value)
    made = {f"out{place}": (F32, 4096) for place in range(len(strides) - 1)}
    return build.program(axes(*sizes), (), ins(a=(F32, 4096), row=(F32, sizes[-1])) + outs(**made))


@pytest.mark.parametrize(
    ("sizes", "strides", "order"),
    [
        ((2, 5, 7, 4), ((140, 4, 20, 1), (140, 4, 20, 1)), "x1 x3"),
        ((2, 5, 4), ((20, 4, 1), (20, 4, 1)), "x1 x2"),  # in order: the outer two are one
        ((5, 2, 4), ((4, 20, 1), (4, 20, 1)), "x0 x2"),  # and so are these, turned round
        ((4, 5, 3), ((1, 4, 20), (1, 4, 20)), "x2 x0"),
        ((2, 5, 4), ((4, 8, 1), (20, 4, 1)), "x0 x1 x2"),  # read in one, written in another
        ((2, 5, 4), ((4, 8, 1), (4, 8, 1), (20, 4, 1)), "x0 x1 x2"),
        ((2, 5, 4), ((8, 8, 1), (8, 8, 1)), "x0 x1 x2"),  # one place for two points
        ((5, 2, 4), ((-4, 20, 1), (-4, 20, 1)), "x0 x1 x2"),
    ],
)
def test_points_are_walked_as_they_lie(
    sizes: tuple[int, ...], strides: tuple[tuple[int, ...], ...], order: str
) -> None:
    merged = merge_axes(copied(sizes, *strides))
    assert [axis.name for axis in merged.parallel] == order.split()


def test_rows_are_in_the_order_of_the_program() -> None:
    build, at = Builder(), Affine.build({"x0": 4, "x1": 8, "r": 1})
    build.store(
        "out", Affine.build({"x0": 1, "x1": 2}), build.reduce("sum", build.load("a", at, F32), F32)
    )
    program = build.program(axes(2, 5), (Axis("r", 4),), ins(a=(F32, 40)) + outs(out=(F32, 10)))
    assert merge_axes(program).parallel == program.parallel


def both(case: Case, first: TileProgram, second: TileProgram) -> None:
    """Run the two halves and compare the result with the whole's."""
    buffers = case.buffers()
    before = {n: t.clone() for n, t in buffers.items()}
    for buffer in first.buffers:
        if buffer.name.startswith("partial"):
            assert buffer.role == "out"
            buffers[buffer.name] = torch.full((case.at(buffer.elements),), 77, dtype=buffer.dtype)
    run(first, buffers, case.sizes)
    run(second, buffers, case.sizes)
    assert_results(case, before, buffers, case.schedules[0])


@pytest.mark.parametrize("parts", [2, 3, 4, 7, 37, 64])
@pytest.mark.parametrize(
    "name",
    [
        "column sum",
        "full sum",
        "max with NaN",
        "min with NaN",
        "prod",
        "int64 sum",
        "int64 max",
        "sum of a constant row",
        "bool",
    ],
)
def test_parts_fold_to_the_whole(name: str, parts: int) -> None:
    halves = split_reduction(CASES[name].program, parts)
    assert halves is not None
    both(CASES[name], *halves)


@pytest.mark.parametrize("parts", [2, 5, 16])
def test_any_size(parts: int) -> None:
    case = CASES["column sum, any size"]
    halves = split_reduction(case.program, parts)
    assert halves is not None
    both(case, *halves)


@pytest.mark.parametrize("parts", [2, 3])
def test_what_follows_the_reduction_is_in_the_second_half(parts: int) -> None:
    """mean(a, 1) + b: the addition waits for all parts."""
    build = Builder()
    total = build.reduce("sum", build.load("a", X0 * 9 + Affine.of("r0"), F32), F32)
    mean = build.map("div", total, build.const(9.0, F32))
    build.store("out", X0, build.map("add", mean, build.load("b", X0, F32)))
    case = Case(
        build.program(
            axes(4), axes(9, reduced=True), ins(a=(F32, 36), b=(F32, 4)) + outs(out=(F32, 4))
        ),
        lambda: {"a": torch.randn(36), "b": torch.randn(4)},
        lambda t: {"out": t["a"].double().view(4, 9).mean(1) + t["b"]},
        CASES["softmax"].schedules,
    )
    halves = split_reduction(case.program, parts)
    assert halves is not None
    assert "b" not in {b.name for b in halves[0].buffers}
    both(case, *halves)


def logsumexp(build: Builder, x: int) -> int:
    top = build.reduce("max", x, F32)
    powers = build.map("exp", build.map("sub", x, top))
    return build.map("add", top, build.map("log", build.reduce("sum", powers, F32)))


def with_empty_parts() -> torch.Tensor:
    a = 40 * torch.randn(5, 24)
    a[1, :12] = a[2, 12:] = a[3] = -torch.inf
    a[4, 5] = torch.nan
    return a


def far_from_zero() -> torch.Tensor:
    a = torch.randn(5, 24) + 100 * torch.randn(5, 1)
    a[2] = 0.1
    return a


def with_infinite_parts() -> torch.Tensor:
    a = torch.cat([with_empty_parts(), 40 * torch.randn(2, 24)])
    a[5, ::3], a[6, 7], a[6, :6] = torch.inf, torch.inf, -torch.inf
    return a


BESIDE = {
    "guarded logsumexp": rows(
        guarded_logsumexp, lambda a: a.logsumexp(1), (7, 24), (), row_result=True,
        values=with_infinite_parts,
    ),
    "variance": rows(
        variance(24), lambda a: a.var(1, correction=0), (5, 24), (), row_result=True,
        values=far_from_zero,
    ),
    "logsumexp": rows(
        logsumexp, lambda a: a.logsumexp(1), (5, 24), (), row_result=True, values=with_empty_parts
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("parts", [2, 3, 4, 7, 24])
def test_reductions_that_go_on_beside_another(name: str, parts: int) -> None:
    case = replace(BESIDE[name], schedules=CASES["softmax"].schedules)
    assert levels(case.program)[-1] == 1
    halves = split_reduction(case.program, parts)
    assert halves is not None
    assert halves[0].parallel[0].size == {7: 8}.get(parts, parts)  # parts of one size
    assert levels(halves[0])[-1] == 1
    both(case, *halves)


@pytest.mark.parametrize(("limit", "instead"), [(1.0, 0.0), (torch.inf, 1.0)])
def test_another_guard_waits_for_the_maximum(limit: float, instead: float) -> None:
    def body(build: Builder, x: int) -> int:
        return guarded_logsumexp(build, x, limit, instead)

    program = rows(body, lambda a: a.logsumexp(1), (7, 24), (), row_result=True).program
    assert levels(program)[-1] == 2
    assert split_reduction(program, 4) is None


def test_no_parts_of_one_size() -> None:
    long = rows(variance(2 * 1087), lambda a: a.var(1), (2, 2 * 1087), (), row_result=True)
    assert split_reduction(long.program, 4) is None
    assert split_reduction(CASES["variance, any size"].program, 4) is None


@pytest.mark.parametrize(
    "name", ["softmax", "layer norm", "argmax", "cumsum", "norm backward", "broadcasting", "gather"]
)
def test_declined(name: str) -> None:
    assert split_reduction(CASES[name].program, 4) is None


def test_a_result_read_by_every_element_of_the_row_is_declined() -> None:
    case = rows(lambda b, x: b.map("div", x, b.reduce("sum", x, F32)), softmax, (4, 9), ())  # type: ignore[arg-type]
    assert split_reduction(case.program, 3) is None
