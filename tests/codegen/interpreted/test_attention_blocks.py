"""Blocks classified and listed by kernels, in Triton's interpreter, against every score asked."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.cost_model.attention_tiles import Row, Tile
from iocompiler.ops.attention_classes import CLASSES
from iocompiler.runtime.attention import Problem, forward
from iocompiler.runtime.attention_blocks import lists
from iocompiler.tile.score_blocks import Grid
from iocompiler.tile.score_reference import evaluate
from tests.ops.score_programs import CASES

# Triton's interpreter in loops
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


def asked(name: str, operands: list[Tensor], grid: Grid) -> Tensor:
    """The class of each block [B, H, M, N]."""
    program = CASES[name].program()
    assert program.keep is not None
    sizes = (grid.batch, grid.heads, grid.rows, grid.columns)
    shapes = ((-1, 1, 1, 1), (-1, 1, 1), (-1, 1), (-1,))
    places = {x: torch.arange(n).reshape(s) for x, n, s in zip("bhij", sizes, shapes, strict=True)}
    kept = evaluate(program, [program.keep], None, places, operands, [], torch.float64)[0]
    kept = kept.expand(sizes)
    found = torch.empty((grid.batch, grid.heads, *grid.counts), dtype=torch.int8)
    for m in range(found.shape[2]):
        for n in range(found.shape[3]):
            rows, columns = slice(m * grid.m, (m + 1) * grid.m), slice(n * grid.n, (n + 1) * grid.n)
            block = kept[:, :, rows, columns].flatten(2)
            found[:, :, m, n] = block.any(-1).to(torch.int8) + block.all(-1)
    return found


@pytest.mark.parametrize("sizes", [(64, 96), (70, 90), (90, 40)], ids=str)
@pytest.mark.parametrize("name", ["document", "padding", "block mask"])
def test_classes_and_lists(name: str, sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    case, grain = CASES[name], Grid(2, 2, *sizes, 16, 16)
    operands = case.operands(2, 2, *sizes)
    tile = Tile(16, 16, 4, 1)
    q, k = (torch.empty(2, 2, length, 16) for length in sizes)
    tiles = Row((0, 0), 4, 16, tile, tile, tile, tile)
    problem = Problem(q, k, k, case.program(), tuple(operands), tiles=tiles)
    kinds = problem.classes(grain)
    exact = asked(name, operands, grain)
    alone, read = case.program().mask()  # and by the operator that layers share
    same = CLASSES([operands[n] for n in read], [], [2, 2, *sizes], [16, 16], alone.key)
    assert torch.equal(kinds, same)
    torch.testing.assert_close(kinds.expand_as(exact), exact)
    assert kinds.shape[1] == 1, "no mask here differs from head to head"
    for m, n, transposed in ((32, 16, True), (16, 64, False), (64, 32, True)):
        grid = Grid(2, 2, *sizes, m, n)
        wanted = asked(name, operands, grid)
        if transposed:
            wanted = wanted.transpose(2, 3)
        if sizes[0 if transposed else 1] % (m if transposed else n):
            wanted[..., -1].clamp_(max=1)  # what reaches past the end is never full
        found = lists(problem.form, Tile(m, n, 4, 1), transposed)
        entries = found.entries(kinds)
        assert found.room == wanted.shape[3]
        counts = (wanted[:, 0] > 0).sum(-1)
        in_order = counts.gather(1, entries[:, 0, :, -1].long().expand_as(counts))
        assert torch.equal(in_order, counts.sort(-1, descending=True)[0])
        for b in range(kinds.shape[0]):
            for line, row in zip(entries[b, 0].tolist(), wanted[b, 0], strict=True):
                partial, full = line[:2]
                assert line[2 : 2 + partial] == (row == 1).nonzero().flatten().tolist()
                start = 2 + found.room
                assert line[start : start + full] == (row == 2).nonzero().flatten().tolist()


@pytest.mark.parametrize("grain", [(16, 16), (32, 16)], ids=["its own", "another"])
def test_classes_that_are_given(grain: tuple[int, int]) -> None:
    """Those of a layer before, where they are of the blocks that this one has."""
    torch.manual_seed(0)
    case, tile = CASES["document"], Tile(16, 16, 4, 1)
    operands = tuple(case.operands(2, 2, 70, 90))
    q, k = (torch.randn(2, 2, length, 16) for length in (70, 90))
    tiles = Row((0, 0), 4, 16, tile, tile, tile, tile)
    alone, read = case.program().mask()
    given = CLASSES([operands[n] for n in read], [], [2, 2, 70, 90], list(grain), alone.key)
    results = []
    for known in (None, given):
        problem = Problem(q, k, k, case.program(), operands, tiles=tiles, known=known)
        results.append(torch.empty_like(q))
        forward(problem, results[-1])
        assert (problem._classes is given) == (known is given and grain == (16, 16))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_classes_of_nothing() -> None:
    alone, read = CASES["document"].program().mask()
    operands = CASES["document"].operands(2, 2, 70, 90)
    setting = ([operands[n] for n in read], [], [2, 2, 0, 90], [16, 16], alone.key)
    assert CLASSES(*setting).shape == (2, 1, 0, 6)
    torch.library.opcheck(CLASSES, setting, test_utils=("test_schema", "test_faketensor"))
