"""Random programs, compiled, against float64 eager; more by ``--fuzz N --seed S``."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from tests.fuzz.generate import generate
from tests.fuzz.judge import valid, verdict
from tests.fuzz.program import ATTENTION, Given, Program, Step
from tests.fuzz.run import failure
from tests.fuzz.shrink import shrink

PARTS = 8

pytestmark = pytest.mark.filterwarnings("ignore")  # of eager, about what a random program does


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)  # Dynamo's, on programs that it refuses
    yield
    logging.disable(logging.NOTSET)


def _failures(request: pytest.FixtureRequest, part: int, engine: str, device: str) -> list[str]:
    first, count = request.config.getoption("--seed"), request.config.getoption("--fuzz")
    seeds = range(first + part, first + count, PARTS)
    return list(filter(None, (failure(seed, engine, device) for seed in seeds)))


@pytest.mark.parametrize("part", range(PARTS))
def test_random_programs(part: int, request: pytest.FixtureRequest) -> None:
    found = _failures(request, part, "reference", "cpu")
    assert not found, "\n".join(found)


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(PARTS))
def test_random_programs_on_a_gpu(part: int, request: pytest.FixtureRequest) -> None:
    found = _failures(request, part, "auto", "cuda")
    assert not found, "\n".join(found)


def test_a_seed_gives_one_program() -> None:
    assert generate(7) == generate(7)
    assert generate(7) != generate(8)
    assert sum(map(valid, map(generate, range(40)))) > 30


def test_a_failing_program_shrinks() -> None:
    def fails(program: Program) -> bool:
        return valid(program) and any(".cos()" in step.text for step in program.steps)

    steps = (
        Step("v0", "{0}.sin()", ("x0",)),
        Step("v1", "{0}.cos()", ("v0",)),
        Step("v2", "{0} + {1}", ("v1", "x1")),
        Step("v3", "{0}.sum({1}.dim() - 1)", ("v2", "x1")),
    )
    given = (("x0", Given((5, 7), "float16", "sliced", True)), ("x1", Given((7,))))
    small = shrink(Program(given, steps, ("v3", "v0"), True, True), fails)
    assert small.source().splitlines()[1:] == ["    v1 = x0.cos()", "    return (v1,)"]
    (one,) = (one for _, one in small.given)
    assert one == Given(())
    assert "def test_seed_3()" in small.as_test("seed 3")


def test_attention_is_judged_by_eagers_own() -> None:
    """Seed 133191: scores in the thousands, where every fused backward has fewer digits."""
    given = (("x0", Given((33, 33), layout="transposed", grad=True)),)
    steps = (
        Step("v0", "{0}.flip(1).cumsum(1)", ("x0",)),
        Step("v1", ATTENTION, ("v0", "v0")),
    )
    assert not verdict(Program(given, steps, ("v1",)))


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 3, 5, 3)])
def test_a_fused_program_computes_the_same(shape: tuple[int, ...]) -> None:
    steps = (Step("v0", ATTENTION, ("x0", "x0")),)
    program = Program((("x0", Given(shape)),), steps, ("v0",))
    fused = program.fused()
    assert fused != program
    torch.testing.assert_close(*(p.function()(*p.draw(0)) for p in (fused, program)))
