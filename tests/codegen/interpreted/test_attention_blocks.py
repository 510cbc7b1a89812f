"""Blocks classified and listed by kernels, in Triton's interpreter, against every score asked."""

from __future__ import annotations

import os
from itertools import product

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.cost_model.attention_tiles import Row, Tile
from iocompiler.ops.attention_classes import CLASSES, TABLE
from iocompiler.runtime.attention import Problem, backward, forward
from iocompiler.runtime.attention_blocks import Lists
from iocompiler.tile.score_blocks import Grid
from iocompiler.tile.score_reference import evaluate
from iocompiler.tile.score_tables import listed
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
        room = wanted.shape[3]
        given = (sizes, [16, 16], [m, n])
        entries = TABLE(kinds, *given, transposed)
        torch.library.opcheck(
            *(TABLE, (kinds, *given, transposed)), test_utils=("test_schema", "test_faketensor")
        )
        plain = listed(kinds, *given, transposed=transposed)
        counts = (wanted[:, 0] > 0).sum(-1)
        in_order = counts.gather(1, entries[:, 0, :, -1].long().expand_as(counts))
        assert torch.equal(in_order, counts.sort(-1, descending=True)[0])
        assert torch.equal(plain[..., -1], entries[..., -1])
        for b, each in product(range(kinds.shape[0]), (entries, plain)):
            for line, row in zip(each[b, 0].tolist(), wanted[b, 0], strict=True):
                partial, full = line[:2]
                assert line[2 : 2 + partial] == (row == 1).nonzero().flatten().tolist()
                start = 2 + room
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


def test_lists_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other kernels' tiles, and none, are found anew; those of the same are read."""
    torch.manual_seed(0)
    case, lengths = CASES["document"], (70, 90)
    operands = tuple(case.operands(2, 2, *lengths))
    q, k = (torch.randn(2, 2, length, 16) for length in lengths)
    tiles = Row((0, 0), 4, 16, *(Tile(m, n, 4, 1) for m, n in ((32, 16), (16, 32), (16, 16))),
                Tile(16, 16, 4, 1))  # fmt: skip
    alone, read = case.program().mask()
    classes = CLASSES([operands[n] for n in read], [], [2, 2, *lengths], [16, 16], alone.key)
    of_forward, of_dq, of_dkv = (
        TABLE(classes, lengths, [16, 16], [tile.m, tile.n], turned)
        for tile, turned in ((tiles.forward, False), (tiles.dq, False), (tiles.dkv, True))
    )
    asked: list[Tensor] = []
    entries = Lists.entries
    monkeypatch.setattr(Lists, "entries", lambda *given: asked.append(given[1]) or entries(*given))
    found = []
    for before, behind in (((), ()), ((of_forward,), (of_dq, of_dkv)), ((of_dkv,), (of_dkv,))):
        asked.clear()
        given = (q, k, k, case.program(), operands)
        ahead = Problem(*given, tiles=tiles, known=classes, tables=before)
        out, results = torch.empty_like(q), [torch.empty_like(x) for x in (q, k, k)]
        lse = forward(ahead, out)
        after = Problem(*given, tiles=tiles, known=classes, tables=behind)
        backward(after, torch.ones_like(out), out, lse, None, results)
        assert len(asked) == (0 if len(behind) == 2 else 3)
        found.append([out, *results])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0, equal_nan=True)


def test_classes_of_nothing() -> None:
    alone, read = CASES["document"].program().mask()
    operands = CASES["document"].operands(2, 2, 70, 90)
    setting = ([operands[n] for n in read], [], [2, 2, 0, 90], [16, 16], alone.key)
    assert CLASSES(*setting).shape == (2, 1, 0, 6)
    torch.library.opcheck(CLASSES, setting, test_utils=("test_schema", "test_faketensor"))
    table = (CLASSES(*setting), [0, 90], [16, 16], [32, 16])
    for transposed, shape in ((False, (2, 1, 0, 15)), (True, (2, 1, 6, 3))):
        assert TABLE(*table, transposed).shape == shape
        assert listed(*table, transposed=transposed).shape == shape
