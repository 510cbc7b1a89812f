"""Score programs: text, folding, derivatives, proofs, and blocks that are what they are said to
be.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from iocompiler.tile.score import ScoreProgram, parsed
from iocompiler.tile.score_algebra import LOG2E, NotDifferentiable, derivative, peeled, scaled
from iocompiler.tile.score_blocks import Grid, classify
from iocompiler.tile.score_builder import ScoreBuilder
from iocompiler.tile.score_operands import use
from iocompiler.tile.score_proof import always
from iocompiler.tile.score_reference import evaluate
from iocompiler.tile.score_tables import extents, table, without_loads
from tests.ops.score_programs import CASES

SIZES = (2, 3, 70, 90)


def places() -> dict[str, Tensor]:
    shapes = {"b": (-1, 1, 1, 1), "h": (-1, 1, 1), "i": (-1, 1), "j": (-1,)}
    return {
        name: torch.arange(n).reshape(shape)
        for (name, shape), n in zip(shapes.items(), SIZES, strict=True)
    }


def value(program: ScoreProgram, wanted: int, score: Tensor, operands: list[Tensor]) -> Tensor:
    return evaluate(program, [wanted], score, places(), operands, [], torch.float64)[0]


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].program().keep])
def test_a_mask_alone_keeps_the_same_scores(name: str) -> None:
    program = CASES[name].program()
    operands = list(CASES[name].operands(*SIZES))
    alone, read = program.mask()
    assert not {op.kind for op in alone.ops} & {"score"}
    given = [operands[n] for n in read]
    assert len(given) == len({op.value for op in alone.ops if op.kind == "load"})
    assert program.keep is not None
    assert alone.keep is not None
    score = torch.randn(SIZES, dtype=torch.float64)
    kept = value(alone, alone.keep, score, given)
    assert torch.equal(kept, value(program, program.keep, score, operands))


@pytest.mark.parametrize("name", CASES)
def test_text_goes_both_ways(name: str) -> None:
    program = CASES[name].program()
    assert parsed(program.key) == program
    assert "score" in str(program)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("m", "n"), [(16, 32), (32, 16), (7, 90), (1, 1)])
def test_blocks_are_what_they_are_said_to_be(name: str, m: int, n: int) -> None:
    torch.manual_seed(0)
    case, grid = CASES[name], Grid(*SIZES, m, n)
    program, operands = case.program(), case.operands(*SIZES)
    some, every = classify(program, grid, operands, [])
    kept = torch.ones(SIZES, dtype=torch.bool)
    if program.keep is not None:
        kept = value(program, program.keep, torch.zeros(SIZES), operands).expand(SIZES)
    for row in range(grid.counts[0]):
        for column in range(grid.counts[1]):
            block = kept[:, :, row * m : (row + 1) * m, column * n : (column + 1) * n].flatten(2)
            assert (block.any(-1) <= some[:, :, row, column]).all()
            assert (block.all(-1) >= every[:, :, row, column]).all()


@pytest.mark.parametrize("name", ["causal", "window", "full"])
def test_blocks_of_plain_masks_are_sharp(name: str) -> None:
    program = CASES[name].program()
    some, every = classify(program, Grid(1, 1, 64, 64, 1, 1), [], [])
    assert torch.equal(some, every)
    found = table(program, Grid(1, 1, 64, 64, 16, 16), [], [])
    assert found.ranges
    if name == "causal":  # first block, partial ones, full ones, partial ones
        rows = [[0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 2, 1], [0, 0, 3, 1]]
        assert found.entries[0, 0].tolist() == rows


def test_a_block_past_the_end_is_never_full() -> None:
    found = table(CASES["full"].program(), Grid(1, 1, 64, 70, 16, 16), [], [])
    assert found.entries[0, 0, 0].tolist() == [0, 0, 4, 1]
    turned = table(CASES["full"].program(), Grid(1, 1, 70, 64, 16, 16), [], [], transposed=True)
    assert turned.entries[0, 0, 0].tolist() == [0, 0, 4, 1]


def test_rows_with_many_blocks_come_first() -> None:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    for row, column in ((0, 48), (16, 0), (16, 16), (16, 48), (32, 48), (48, 0), (48, 32)):
        mask[row, column] = True
    found = table(CASES["block mask"].program(), Grid(1, 1, 64, 64, 16, 16), [mask], [])
    assert not found.ranges
    assert found.entries[0, 0, :, -1].tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("name", ["document", "padding", "block mask", "sunk", "window"])
def test_what_reads_no_tensor_keeps_no_less(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    program, operands = case.program(), case.operands(*SIZES)
    wider = without_loads(program)
    assert wider.keep is None or not wider.loads(wider.keep)
    assert (wider.keep is None) == (name in ("padding", "block mask"))
    kept = value(program, program.keep or 0, torch.zeros(SIZES), operands).expand(SIZES)
    found = extents(wider, Grid(*SIZES, 16, 32), [])
    for m, n in ((m, n) for m in range(5) for n in range(3)):
        first, last = found[0, 0, m].tolist()
        if not first <= n <= last:
            assert not kept[:, :, m * 16 : (m + 1) * 16, n * 32 : (n + 1) * 32].any()
    if name in ("document", "sunk", "window"):
        assert found[0, 0, :, 1].tolist() == [0, 0, 1, 1, 2]


def test_a_row_of_nothing_has_no_blocks() -> None:
    build = ScoreBuilder()
    late = build.map("ge", build.index("i"), build.const(32))
    program = build.program(build.score(), late)
    assert extents(program, Grid(1, 1, 64, 64, 16, 16), [])[0, 0].tolist() == [
        *([0, -1], [0, -1]),
        *([0, 3], [0, 3]),
    ]


@pytest.mark.parametrize("name", CASES)
def test_scaling_and_peeling_change_nothing_but_the_scale(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    program, operands = case.program(), case.operands(*SIZES)
    score = torch.randn(SIZES, dtype=torch.float64)
    plain = value(program, program.score, score, operands)
    factor, rest = peeled(program)
    torch.testing.assert_close(value(rest, rest.score, score * factor, operands), plain)
    wide = scaled(rest, LOG2E, factor)
    torch.testing.assert_close(value(wide, wide.score, score, operands), plain * LOG2E)
    assert factor in (0.3, 0.3 * 0.5)


FUNCTIONS = {
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "exp": torch.exp, "abs": torch.abs,
    "sqrt": lambda x: torch.sqrt(x * x + 1), "log": lambda x: torch.log(x * x + 1),
    "maximum": lambda x: x.clamp_min(0.25), "minimum": lambda x: x.clamp_max(0.25),
    "div": lambda x: 1 / (x * x + 1), "sin": torch.sin, "cos": torch.cos, "exp2": torch.exp2,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(name: str) -> None:
    build = ScoreBuilder()
    x = build.score()
    if name in ("sqrt", "log", "div"):
        x = build.map("add", build.map("mul", x, x), build.const(1.0))
    other = {"maximum": (0.25,), "minimum": (0.25,)}.get(name, ())
    arguments = [x, *(build.const(each) for each in other)]
    y = build.map("div", build.const(1.0), x) if name == "div" else build.map(name, *arguments)
    program = build.program(build.map("mul", y, build.const(3.0)))
    product = next(n for n, op in enumerate(program.ops) if op.kind == "score")
    widened, slope = derivative(program, product)
    assert slope is not None
    score = torch.randn(SIZES, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad((3.0 * FUNCTIONS[name](score)).sum(), score)
    torch.testing.assert_close(value(widened, slope, score.detach(), []).expand(SIZES), expected)


def test_what_has_no_derivative_says_so() -> None:
    build = ScoreBuilder()
    program = build.program(build.map("floor", build.score()))
    with pytest.raises(NotDifferentiable, match="floor"):
        derivative(program, 0)


def test_folding() -> None:
    build = ScoreBuilder()
    s, i, j = build.score(), build.index("i"), build.index("j")
    twice = build.map("mul", build.map("mul", s, build.const(2.0)), build.const(0.25))
    assert build.literal(build.ops[twice].inputs[1]) == 0.5
    assert build.map("add", i, build.const(0)) == i
    negated = build.map("logical_not", build.map("or", build.map("lt", i, j), build.const(False)))
    assert build.ops[negated].fn == "ge"
    unsure = build.map("logical_not", build.map("lt", s, build.const(0.0)))
    assert build.ops[unsure].fn == "logical_not"  # of a NaN both are false
    assert build.map("where", build.const(True), i, j) == i
    assert math.isnan(float(build.literal(build.const(float("nan"))) or 0))


@pytest.mark.parametrize(
    ("name", "diagonal", "proved"),
    [
        ("causal", True, True),
        ("causal", False, True),
        ("window", True, True),
        ("window", False, False),
        ("document", True, True),
        ("document", False, False),
        ("padding", True, False),
        ("block mask", True, False),
    ],
)
def test_rows_that_keep_a_column(name: str, diagonal: bool, proved: bool) -> None:
    program = CASES[name].program()
    assert program.keep is not None
    assert always(program.ops, program.keep, diagonal=diagonal) == proved


@pytest.mark.parametrize(
    ("name", "way"), [("alibi", "row"), ("bias", "tile"), ("relative", "diagonal")]
)
def test_ways_an_operand_is_read(name: str, way: str) -> None:
    program = CASES[name].program()
    (load,) = program.loads(program.score)
    found = use(program, load)
    assert found is not None
    assert found.way == way


def test_a_gather_is_no_way() -> None:
    build = ScoreBuilder()
    i, j = build.index("i"), build.index("j")
    place = build.map("add", i, j)
    found = build.load(0, (place,), "float")
    twice = build.load(1, (i, i), "float")
    program = build.program(build.map("add", build.map("add", build.score(), found), twice))
    assert [use(program, load) for load in program.loads(program.score)] == [None, None]


@pytest.mark.parametrize(
    ("subscripts", "way"),
    [
        (lambda b, i, j, n: (i, b.map("int_trunc_div", j, n)), "part"),
        (lambda b, i, j, n: (b.index("h"), i, b.map("int_trunc_mod", j, n)), "part"),
        (lambda b, i, j, n: (b.map("int_trunc_div", j, n),), None),
        (lambda b, i, j, n: (j, b.map("int_trunc_div", i, n)), None),
        (lambda b, i, j, n: (i, j, b.map("int_trunc_div", j, n)), None),
        (lambda b, i, j, n: (i, b.map("int_trunc_div", b.map("sub", j, i), n)), None),
        (
            lambda b, i, j, n: (i, b.map("int_trunc_div", j, n), b.map("int_trunc_mod", j, n)),
            None,
        ),
    ],
)
def test_parts_of_the_columns_have_a_gradient_of_each_row(subscripts, way) -> None:
    b = ScoreBuilder()
    load = b.load(0, subscripts(b, b.index("i"), b.index("j"), b.const(7)), "float")
    program = b.program(b.map("add", b.score(), load))
    (load,) = program.loads(program.score)
    found = use(program, load)
    assert (found and found.way) == way
