"""Scores whose dims are parted while something is added to them, as ViTDet's are for the positions
in an image; and what is no such sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iocompiler.ops.scored_attention import FORWARD
from iocompiler.passes.attention.programs import loads
from iocompiler.passes.attention.running import choice
from tests.accuracy import assert_as_accurate_as_eager
from tests.passes.attention_cases import Compiled, Spelling
from tests.passes.test_attention_programs import programs

BATCH, HEIGHT, WIDTH, SIZE = 3, 4, 5, 8
LENGTH = HEIGHT * WIDTH


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    return torch.randn(*shape, generator=generator).requires_grad_()


def inputs(batch: int = BATCH) -> dict[str, Tensor]:
    made = {name: draw(batch, LENGTH, SIZE) for name in "qkv"}
    return made | {"rows": draw(HEIGHT, HEIGHT, SIZE), "columns": draw(WIDTH, WIDTH, SIZE)}


def parted(q, k):
    s = q @ k.mT * 0.3
    return s.view(-1, HEIGHT, WIDTH, HEIGHT, WIDTH)


def of_image(q, rows, columns):
    lies = q.reshape(-1, HEIGHT, WIDTH, SIZE)
    of_rows = torch.einsum("bhwc,hkc->bhwk", lies, rows)
    return of_rows, torch.einsum("bhwc,wkc->bhwk", lies, columns)


def vitdet(q, k, v, rows, columns):
    r, c = of_image(q, rows, columns)
    s = parted(q, k) + r[:, :, :, :, None] + c[:, :, :, None, :]
    return s.view(-1, LENGTH, LENGTH).softmax(-1) @ v


def other_way(q, k, v, rows, columns):
    r, c = of_image(q, rows, columns)
    s = c[:, :, :, None, :] + (parted(q, k) - r[:, :, :, :, None])
    return s.flatten(3).flatten(1, 2).float().softmax(-1).to(v.dtype) @ v


def of_rows_alone(q, k, v, rows, columns):
    s = parted(q, k) - (rows.sum(-1)[:, None, :, None] + 0 * columns.sum())
    return s.reshape(-1, LENGTH, LENGTH).softmax(-1) @ v


TAKEN = [vitdet, other_way, of_rows_alone]


@pytest.mark.parametrize("told", [True, False], ids=["program", "library"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("function", TAKEN)
def test_taken(
    function: Callable[..., Any], dtype: torch.dtype, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if told:
        monkeypatch.setattr(choice, "wanted", lambda call, found: True)
    made: list[Compiled] = []

    def compile_(module: nn.Module) -> Compiled:
        made.append(Compiled(module))
        return made[0]

    assert_as_accurate_as_eager(lambda: Spelling(function), inputs(), compile_, dtype=dtype)
    assert made[0].variants == ["program+score" if told else "bias"], made[0].misses
    if told:
        (program,) = programs(made[0])
        loaded = [x for n in _calls(made[0]) for x in n.args[3]]  # type: ignore[union-attr]
        assert len(program.loads(program.score)) == len(loaded)
        assert all(each.meta["val"].shape[3] in (HEIGHT, WIDTH) for each in loaded)


def _calls(compiled: Compiled) -> list[torch.fx.Node]:
    return [n for graph in compiled.graphs for n in graph.graph.nodes if n.target is FORWARD]


def of_keys(q, k, v, table):
    s = parted(q, k) + table[:, 0, 0, :1]
    return s.view(-1, LENGTH, LENGTH).softmax(-1) @ v


def of_rows_and_keys(q, k, v, table):
    s = parted(q, k) + table[:, :, :1]
    return s.view(-1, LENGTH, LENGTH).softmax(-1) @ v


def of_rows_and_columns(q, k, v, table):
    s = parted(q, k) + table[:, :, :1, :, :1]
    return s.view(-1, LENGTH, LENGTH).softmax(-1) @ v


@pytest.mark.parametrize(
    ("function", "loaded"),
    [
        (of_keys, (1, 1, LENGTH, LENGTH)),
        (of_rows_and_keys, (1, 1, LENGTH, LENGTH)),
        (of_rows_and_columns, (1, 1, LENGTH, HEIGHT)),
    ],
)
def test_tables_that_images_share_are_not_repeated(
    function: Callable[..., Any], loaded: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the parts of a column, only one that rows have too is loaded as it is."""
    monkeypatch.setattr(choice, "wanted", lambda call, found: True)
    made: list[Compiled] = []

    def compile_(module: nn.Module) -> Compiled:
        made.append(Compiled(module))
        return made[0]

    given = {name: draw(BATCH, LENGTH, SIZE) for name in "qkv"}
    given["table"] = draw(1, HEIGHT, WIDTH, HEIGHT, WIDTH)
    assert_as_accurate_as_eager(lambda: Spelling(function), given, compile_, dtype=torch.float32)
    (call,) = _calls(made[0])
    assert [tuple(x.meta["val"].shape) for x in call.args[3]] == [loaded]  # type: ignore[union-attr]


def test_more_parts_than_a_tile_of_sums_holds_are_put_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "wanted", lambda call, found: True)
    monkeypatch.setattr(loads, "_MOST_PARTS", WIDTH - 1)
    compiled, given = Compiled(vitdet), inputs()
    torch.testing.assert_close(compiled(**given), vitdet(**given))
    (call,) = _calls(compiled)
    shapes = [tuple(x.meta["val"].shape) for x in call.args[3]]  # type: ignore[union-attr]
    assert shapes == [(BATCH, 1, LENGTH, LENGTH)]


def test_batches_change_without_recompiling() -> None:
    compiled = Compiled(vitdet, dynamic=True)
    for batch in (6, 3, 5):
        given = inputs(batch)
        torch.testing.assert_close(compiled(**given), vitdet(**given))
    assert compiled.variants == ["bias"]


def over_columns_alone(q, k, v, rows, columns):
    """Among the keys of one row of the image."""
    s = parted(q, k) + of_image(q, rows, columns)[0][..., None]
    return s.softmax(-1).view(-1, LENGTH, LENGTH) @ v


def over_queries(q, k, v, rows, columns):
    s = parted(q, k) + of_image(q, rows, columns)[0][..., None]
    return s.view(-1, LENGTH, LENGTH).softmax(-2) @ v


def capped(q, k, v, rows, columns):
    s = torch.tanh(parted(q, k) + of_image(q, rows, columns)[0][..., None])
    return s.view(-1, LENGTH, LENGTH).softmax(-1) @ v


def turned(q, k, v, rows, columns):
    s = parted(q, k) + of_image(q, rows, columns)[0][..., None]
    return s.transpose(-1, -2).reshape(-1, LENGTH, LENGTH).softmax(-1) @ v


def subtracted_from(q, k, v, rows, columns):
    s = of_image(q, rows, columns)[0][..., None] - parted(q, k)
    return s.reshape(-1, LENGTH, LENGTH).softmax(-1) @ v


def written_between(q, k, v, rows, columns):
    r = of_image(q, rows, columns)[0].clone()
    s = parted(q, k) + r[..., None]
    r[:, 1:].zero_()
    return s.view(-1, LENGTH, LENGTH).softmax(-1) @ v + r.sum()


def never_whole(q, k, v, rows, columns):
    lies = [x.reshape(-1, HEIGHT, WIDTH, SIZE) for x in (q, k)]
    s = torch.einsum("bhwc,byxc->bhwyx", *lies) + rows.sum() + columns.sum()
    return s.reshape(-1, LENGTH, LENGTH).softmax(-1) @ v


@pytest.mark.parametrize(
    "function",
    [
        over_columns_alone,
        over_queries,
        capped,
        turned,
        subtracted_from,
        written_between,
        never_whole,
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_declined(function: Callable[..., Any], grad: bool) -> None:
    compiled, given = Compiled(function), inputs()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(**given), function(**given))
    assert compiled.variants == []
    assert len(compiled.misses) == 1
    targets = {node.target for node in compiled.graphs[0].graph.nodes}
    assert torch.ops.aten.positive.default not in targets
