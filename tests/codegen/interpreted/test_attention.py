"""The attention templates in Triton's interpreter; ``test_interpreted.py`` starts this."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.cost_model.attention_tiles import Row, Tile
from iocompiler.ops.column_sums import ColumnSums, lines
from iocompiler.ops.packed_gradients import Packing
from iocompiler.runtime import attention, attention_form
from tests.ops.score_checks import Shape, problems, some_slow
from tests.ops.score_programs import CASES, heads

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, of NaN that is meant
    # Triton's interpreter in loops
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
_TILES = (Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(32, 32, 4, 1))
TILES = Row((0, 0), 4, 256, *_TILES)


@pytest.mark.parametrize("name", CASES)
def test_programs(name: str) -> None:
    assert not problems(name, (2, 2, 2, 48, 64, 16, 16), torch.float32, tiles=TILES)


@pytest.mark.parametrize("name", ["alibi", "softcap", "document"])
@pytest.mark.parametrize("shape", [(2, 2, 2, 48, 64, 16, 16), (2, 3, 1, 70, 33, 16, 16)], ids=str)
def test_what_rows_share_is_lifted_in_half_precision(name: str, shape: Shape) -> None:
    assert not problems(name, shape, torch.float16, tiles=TILES)


@pytest.mark.parametrize(
    "name",
    some_slow(
        [n for n, x in CASES.items() if x.empty in ("nan", "zero")],
        {"alibi", "document", "sunk", "full"},
    ),
)
def test_dropout(name: str) -> None:
    shape = (2, 4, 2, 40, 56, 16, 16)
    assert not problems(name, shape, torch.float32, tiles=TILES, dropout_p=0.3)


@pytest.mark.parametrize(
    ("name", "dropout_p"), [("alibi", 0.3), ("softcap", 0.0), ("sunk", 0.0), ("sunk", 0.3)]
)
def test_rows_with_a_gradient(name: str, dropout_p: float) -> None:
    shape = (2, 4, 2, 40, 50, 16, 16)
    drop = {"dropout_p": dropout_p, "by_rows": True}
    assert not problems(name, shape, torch.float32, tiles=TILES, **drop)


_ODD = [
    *("window", "alibi", "document", "padding, uniform", "relative"),
    *("squared relu", "sigmoid of all"),
]


@pytest.mark.parametrize("name", _ODD)
@pytest.mark.parametrize(
    "shape",
    [(1, 4, 2, 50, 70, 24, 20), (2, 3, 1, 70, 33, 16, 16), (1, 1, 1, 1, 40, 33, 16)],
    ids=str,
)
def test_odd_sizes_and_groups(name: str, shape: Shape) -> None:
    assert not problems(name, shape, torch.float32, tiles=TILES)


@pytest.mark.parametrize(("together", "ahead"), [(1, 0), (4, 0), (4, 1), (2, 2), (1, 99)])
@pytest.mark.parametrize("name", ["alibi", "block mask"])
def test_heads_take_turns(
    name: str, together: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_form, "heads_together", lambda *_: together)
    monkeypatch.setattr(attention_form, "rows_ahead", lambda *_: ahead)
    monkeypatch.setattr(attention_form, "_forms", {})
    assert not problems(name, (2, 3, 1, 40, 33, 16, 16), torch.float32, tiles=TILES)


@pytest.mark.parametrize(
    ("packing", "groups", "width", "dropout_p"),
    [
        ("bs|hd:qkv", 2, 16, 0.0),
        ("bs|hd:qkv", 1, 16, 0.3),
        ("sb|hd:vqk", 1, 20, 0.0),
        ("bsh|d:kqv", 2, 20, 0.3),
    ],
)
def test_gradients_in_one_tensor(packing: str, groups: int, width: int, dropout_p: float) -> None:
    """The bits that stand alone, each where it belongs; nothing is left out or written beyond."""
    torch.manual_seed(0)
    given = [x.float() for x in heads(2, 2, groups, 40, 40, width, width)]
    seed = torch.tensor(11) if dropout_p else None
    problem = attention.Problem(
        *given, CASES["causal"].program(0.3), tiles=TILES, dropout_p=dropout_p, seed=seed
    )
    out = torch.empty_like(given[0])
    lse = attention.forward(problem, out)
    grad = torch.randn_like(out)
    apart = [torch.empty_like(x) for x in given]
    attention.backward(problem, grad, out, lse, None, apart)
    layout = Packing.parsed(packing).layout(tuple(x.shape for x in given))
    room = torch.full((3, *layout.shape), 12345.0)  # what lies around it, and it
    attention.backward(problem, grad, out, lse, None, layout.slices(room[1]))
    assert (room[::2] == 12345.0).all()
    assert (room[1] != 12345.0).all()
    assert room[1].numel() == sum(x.numel() for x in given)
    for one, alone in zip(layout.slices(room[1]), apart, strict=True):
        assert torch.equal(one, alone)


@pytest.mark.parametrize(
    ("name", "shape", "dropout_p", "rows"),
    [
        ("causal", (1, 2, 2, 40, 40, 16, 16), 0.0, 32),
        ("causal", (1, 1, 1, 40, 40, 16, 16), 0.0, 64),
        ("alibi", (2, 2, 1, 33, 50, 24, 20), 0.3, 16),
        ("padding, uniform", (1, 2, 1, 20, 30, 16, 16), 0.0, 32),
        ("squared relu", (2, 1, 1, 17, 31, 16, 16), 0.0, 16),
    ],
)
def test_sums_down_the_columns(name: str, shape: Shape, dropout_p: float, rows: int) -> None:
    """Of the gradients that are written, line by line, or (of lines that are no whole tiles, or
    where values get more than the kernels sum) all in the first one.
    """
    torch.manual_seed(0)
    given = [x.float() for x in heads(*shape)]
    operands = CASES[name].operands(shape[0], shape[1], shape[3], shape[4])
    seed = torch.tensor(11) if dropout_p else None
    problem = attention.Problem(
        *given, CASES[name].program(0.3), tuple(operands), tiles=TILES,
        dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    out = torch.empty((*given[0].shape[:3], shape[6]))
    lse = attention.forward(problem, out)
    results = [torch.empty_like(x) for x in given]
    room = [torch.full((*lines(x.shape, rows), 2), 12345.0) for x in given]
    columns = ColumnSums([x[..., 0] for x in room], rows)
    attention.backward(problem, torch.randn_like(out), out, lse, None, results, columns)
    apart = rows <= 32 and "uniform" not in name
    for gradient, sums, around in zip(results, columns.parts, room, strict=True):
        assert (around[..., 1] == 12345.0).all()
        torch.testing.assert_close(sums.sum(2), gradient.sum(2), rtol=1e-5, atol=1e-5)
        for line, block in enumerate(gradient.split(32, 2)) if apart else ():
            first, *others = sums[:, :, line * (32 // rows) : (line + 1) * (32 // rows)].unbind(2)
            torch.testing.assert_close(first, block.sum(2), rtol=1e-5, atol=1e-5)
            assert not any(x.any() for x in others)
