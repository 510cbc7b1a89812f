"""What rows of scores share: told apart it adds up to the program, wherever the origin lies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from iocompiler.tile.score import ScoreProgram
from iocompiler.tile.score_builder import ScoreBuilder
from iocompiler.tile.score_lift import factored, lifted
from iocompiler.tile.score_reference import evaluate
from tests.ops.score_programs import CASES, alibi

SIZES = (2, 3, 20, 30)


def places(origin: int) -> dict[str, Tensor]:
    shapes = {"b": (-1, 1, 1, 1), "h": (-1, 1, 1), "i": (-1, 1), "j": (-1,)}
    found = {
        name: torch.arange(n).reshape(shape)
        for (name, shape), n in zip(shapes.items(), SIZES, strict=True)
    }
    return found | {"o": torch.tensor(origin)}


def score(program: ScoreProgram, dots: Tensor, operands: list[Tensor], origin: int = 0) -> Tensor:
    given = (program, [program.score], dots, places(origin), operands, [7], torch.float64)
    return evaluate(*given)[0]


def assert_adds_up(program: ScoreProgram, operands: list[Tensor]) -> None:
    dots = torch.randn(SIZES, dtype=torch.float64)
    rest, lift = lifted(program)
    factor, inner = factored(rest)
    whole = score(program, dots, operands)
    for origin in (0, 17):
        found = factor * score(inner, dots, operands, origin)
        if lift is not None:
            assert not {lift.ops[v].fn for v in lift.behind(lift.score)} & {"j"}
            found = found + score(lift, dots, operands, origin)
        torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("name", CASES)
def test_the_parts_add_up(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    assert_adds_up(case.program(), case.operands(*SIZES))
    assert (lifted(case.program())[1] is not None) == (name == "alibi")


def _number(b: ScoreBuilder, s: int) -> int:
    """Keys that begin at a number, by a constant and a loaded slope."""
    apart = b.map("sub", b.map("sub", b.index("j"), b.number(0)), b.index("i"))
    scaled = b.map("mul", b.cast(apart, "float"), b.const(-0.5))
    return b.map("sub", s, b.map("mul", b.load(0, (b.index("h"),), "float"), scaled))


def _column(b: ScoreBuilder, s: int) -> int:
    return b.map("add", b.map("mul", b.cast(b.index("j"), "float"), b.const(0.25)), s)


def _row(b: ScoreBuilder, s: int) -> int:
    return b.map("sub", s, b.map("mul", b.cast(b.index("i"), "float"), b.const(0.25)))


def _twice(b: ScoreBuilder, s: int) -> int:
    return b.map("add", alibi(b, s)[0], b.map("neg", b.cast(b.index("j"), "float")))


@pytest.mark.parametrize("make", [_number, _column, _row, _twice])
def test_lines_of_every_kind_are_lifted(make: Callable[[ScoreBuilder, int], int]) -> None:
    torch.manual_seed(0)
    build = ScoreBuilder()
    dots = build.map("mul", build.score(), build.const(0.3))
    program = build.program(make(build, dots))
    rest, lift = lifted(program)
    assert lift is not None
    assert "i" not in {rest.ops[v].fn for v in rest.behind(rest.score)}
    assert_adds_up(program, [torch.rand(3, dtype=torch.float64)])


def test_what_is_no_line_or_would_be_lost_stays() -> None:
    build = ScoreBuilder()
    s, apart = build.score(), build.map("sub", build.index("j"), build.index("i"))
    distance = build.cast(build.map("abs", apart), "float")
    assert lifted(build.program(build.map("add", s, distance)))[1] is None
    # of an element, which may be -inf, nothing is lifted
    element = build.load(0, (build.index("i"),), "float")
    assert lifted(build.program(build.map("add", s, element)))[1] is None
    low = build.map("where", build.map("lt", apart, build.const(3)), s, build.const(-1e30))
    sunk = build.program(build.map("add", low, build.cast(apart, "float")))
    assert lifted(sunk) == (sunk, None)


def test_factors_are_told_apart_only_of_what_is_no_mask() -> None:
    build = ScoreBuilder()
    s, element = build.score(), build.load(0, (build.index("j"),), "float")
    half = build.const(0.5)
    assert factored(build.program(build.map("mul", s, half)))[0] == 0.5
    for value in (
        build.map("mul", build.map("add", s, element), half),
        build.map("mul", s, build.const(-0.5)),
        build.map("mul", s, element),
        build.map("add", s, half),
    ):
        program = build.program(value)
        assert factored(program) == (1.0, program)
