"""Masks that a module holds: taken for the structure that their values have, compiled again when
these change; and what is left a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iocompiler.backend import Compiler
from iocompiler.graph.fingerprint import fingerprint
from iocompiler.graph.held import look
from iocompiler.ops import target
from iocompiler.passes.attention.running import choice
from iocompiler.tile.score import ScoreProgram
from tests.accuracy import assert_as_accurate_as_eager
from tests.passes.attention_cases import Compiled, heads
from tests.passes.test_attention_programs import programs

INF = math.inf
LENGTH = 7


class Holding(nn.Module):
    """A function of a mask that is a buffer, and of named tensors."""

    def __init__(self, function: Callable[..., Any], mask: Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("mask", mask.clone())

    def forward(self, **tensors: Tensor) -> Any:
        return self.function(self.mask, **tensors)


def added(mask, q, k, v):
    return (q @ k.mT * 0.3 + mask).softmax(-1) @ v


def argument(mask, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sliced(mask, q, k, v):
    rows, columns = q.shape[-2], k.shape[-2]
    return (q @ k.mT * 0.3 + mask[:, :, columns - rows : columns, :columns]).softmax(-1) @ v


def filled(mask, q, k, v):
    keep = mask[:, :, : q.shape[-2], : k.shape[-2]]
    return (q @ k.mT * 0.3).masked_fill(keep == 0, -INF).softmax(-1) @ v


def one_minus(mask, q, k, v):
    return (q @ k.mT * 0.3 + (1.0 - mask) * -1e9).softmax(-1) @ v


def above(value: float, length: int = LENGTH) -> Tensor:
    return torch.full((length, length), value).triu(1)


def banded(value: float) -> Tensor:
    return above(value) + torch.full((LENGTH, LENGTH), value).tril(-3)


def blocks(value: float) -> Tensor:
    keep = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)) > 0
    return torch.zeros(LENGTH, LENGTH).masked_fill(~keep, value)


def slopes(value: float) -> Tensor:
    apart = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]
    return torch.where(apart > 0, value, 0.25 * apart)


LOWEST = torch.finfo(torch.float32).min
BANDS = [
    (added, above(-INF), "causal"),
    (added, above(-1e9), "causal"),
    (argument, above(-1e4), "causal"),
    (argument, above(LOWEST), "causal"),
    (argument, above(-INF)[None, None].expand(2, 4, -1, -1), "causal"),
    (argument, above(-INF) == 0, "causal"),
    (sliced, above(-INF, 20)[None, None], "causal"),
    (filled, torch.ones(1, 1, 20, 20).tril(), "causal"),
    (one_minus, torch.ones(LENGTH, LENGTH).tril(), "causal"),
    (added, banded(-INF), "causal+mask"),
]
NO_BANDS = [(added, blocks(-1e9), "mask"), (added, slopes(-INF), "bias")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("function", "mask", "variant"), [*BANDS, *NO_BANDS])
def test_taken(
    function: Callable[..., Any], mask: Tensor, variant: str, dtype: torch.dtype
) -> None:
    made: list[Compiled] = []

    def compile_(module: nn.Module) -> Compiled:
        made.append(Compiled(module))
        return made[0]

    assert_as_accurate_as_eager(lambda: Holding(function, mask), heads(), compile_, dtype=dtype)
    assert made[0].variants == [variant], made[0].misses


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attention is made a program, as on a GPU those are that have a mask or a bias."""
    monkeypatch.setattr(choice, "wanted", lambda call, found: True)


def program(function: Callable[..., Any], mask: Tensor) -> ScoreProgram:
    made: list[Compiled] = []

    def compile_(module: nn.Module) -> Compiled:
        made.append(Compiled(module))
        return made[0]

    assert_as_accurate_as_eager(
        lambda: Holding(function, mask), heads(), compile_, dtype=torch.float32
    )
    (found,) = programs(made[0])
    return found


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize(("function", "mask", "variant"), BANDS)
def test_a_program_reads_no_matrix(
    function: Callable[..., Any], mask: Tensor, variant: str
) -> None:
    found = program(function, mask)
    assert found.keep is not None
    assert found.loads(found.score, found.keep) == ()


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("value", [-INF, -1e9, LOWEST])
@pytest.mark.parametrize(("mask", "biased"), [(blocks, False), (slopes, True)])
def test_what_is_no_band_skips_what_it_hides(
    mask: Callable[[float], Tensor], biased: bool, value: float
) -> None:
    found = program(added, mask(value))
    assert len(found.loads(found.keep)) == 1
    assert bool(found.loads(found.score)) == biased


def row_hidden(value: float) -> Tensor:
    return blocks(value).index_fill(0, torch.tensor([3]), value)


def strictly_causal(value: float) -> Tensor:
    return torch.full((LENGTH, LENGTH), value).triu(0)


@pytest.mark.parametrize("as_program", [True, False])
@pytest.mark.parametrize("value", [-1e9, LOWEST, -INF])
@pytest.mark.parametrize("mask", [row_hidden, strictly_causal])
def test_a_row_that_is_hidden_altogether(
    mask: Callable[[float], Tensor], value: float, as_program: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one finite number the softmax is uniform, of -inf it is NaN, as in eager; a library makes
    zeros of the latter.
    """
    if as_program:
        monkeypatch.setattr(choice, "wanted", lambda call, found: True)
    module, inputs = Holding(added, mask(value)), heads()
    expected = module(**inputs)
    if not as_program:
        expected = expected.nan_to_num(0.0)
    torch.testing.assert_close(Compiled(module)(**inputs), expected, equal_nan=True)


def test_lengths_change_without_recompiling() -> None:
    module = Holding(sliced, above(-INF, 40)[None, None])
    compiled = Compiled(module, dynamic=True)
    for rows, columns in ((7, 7), (11, 11), (33, 33)):
        inputs = heads(rows=rows, columns=columns)
        torch.testing.assert_close(compiled(**inputs), module(**inputs))
    assert compiled.variants == ["causal"]


def test_another_mask_is_another_graph() -> None:
    module, inputs = Holding(added, above(-INF)), heads()
    compiled = Compiled(module)
    for mask, variants in (
        (above(-INF), ["causal"]),
        (banded(-INF), ["causal", "causal+mask"]),
        (torch.randn(LENGTH, LENGTH), ["causal", "causal+mask", "bias"]),
        (above(-INF), ["causal", "causal+mask", "bias"]),
    ):
        module.mask.copy_(mask)
        torch.testing.assert_close(compiled(**inputs), module(**inputs))
        assert compiled.variants == variants
    module.mask = above(-INF)  # another tensor with the same pattern
    compiled(**inputs)
    assert len(compiled.graphs) == 3


def test_a_mask_that_always_changes_is_left_a_tensor() -> None:
    module, inputs = Holding(added, above(-INF)), heads()
    compiled = Compiled(module)
    for high in range(6):
        module.mask.copy_(torch.full((LENGTH, LENGTH), -INF).triu(high + 1))
        torch.testing.assert_close(compiled(**inputs), module(**inputs))
    assert len(compiled.graphs) == 5
    assert compiled.variants[-1] == "bias"


def written(mask, q, k, v):
    mask.zero_()
    return (q @ k.mT * 0.3 + mask).softmax(-1) @ v


def view_written(mask, q, k, v):
    mask[3:].zero_()
    return (q @ k.mT * 0.3 + mask).softmax(-1) @ v


def written_after(mask, q, k, v):
    scores = q @ k.mT * 0.3 + mask
    mask.zero_()
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("function", [view_written, written_after])
def test_a_mask_that_the_graph_writes_is_declined(function: Callable[..., Any]) -> None:
    inputs = heads()
    compiled = Compiled(Holding(function, above(-INF)))
    expected = Holding(function, above(-INF))(**inputs)
    torch.testing.assert_close(compiled(**inputs), expected)
    assert "writes what the attention reads" in compiled.misses[0]


def test_what_a_write_of_the_whole_mask_returns_is_a_tensor() -> None:
    """Whatever the mask held before."""
    inputs = heads()
    compiled = Compiled(Holding(written, above(-INF)))
    expected = Holding(written, above(-INF))(**inputs)
    torch.testing.assert_close(compiled(**inputs), expected)
    assert compiled.variants == ["bias"]


def test_an_argument_of_the_user_s_is_left_a_tensor() -> None:
    def function(mask, **tensors):
        return added(mask, **tensors)

    compiled, inputs = Compiled(function), heads()
    compiled(above(-INF), **inputs)
    torch.testing.assert_close(compiled(banded(-INF), **inputs), added(banded(-INF), **inputs))
    assert compiled.variants == ["bias"]


def test_a_bias_that_is_learned_is_left_a_tensor() -> None:
    class Learning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Parameter(above(-1e9))

        def forward(self, **tensors: Tensor) -> Tensor:
            return added(self.mask, **tensors)

    compiled = Compiled(Learning())
    compiled(**heads())
    assert compiled.variants == ["bias"]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("boolean", [True, False])
def test_modules_of_torch(train: bool, boolean: bool) -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
            self.register_buffer("mask", mask < 0 if boolean else mask)
            self.heads = nn.MultiheadAttention(16, 2, batch_first=True)
            self.layer = nn.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.heads(x, x, x, attn_mask=self.mask, need_weights=False)[0]
            return self.layer(x, x, tgt_mask=self.mask)

    module, x = Decoder().train(train), torch.randn(2, LENGTH, 16)
    compiled = Compiled(module)
    torch.testing.assert_close(compiled(x), module(x))
    assert compiled.variants == ["causal", "causal", "full"]


def test_inductor_is_told_causal() -> None:
    compiled = Compiled(Holding(added, above(-INF)))
    with target.inductor():
        compiled(**heads())
    assert compiled.variants == ["causal"]


def test_through_the_whole_compiler() -> None:
    module, inputs = Holding(added, above(-INF)), heads()
    torch._dynamo.reset()
    run = torch.compile(module, backend=Compiler(engine="reference", strict=True))
    for mask in (above(-INF), banded(-1e9)):
        module.mask.copy_(mask)
        torch.testing.assert_close(run(**inputs), module(**inputs))


def test_the_disk_cache_tells_patterns_apart() -> None:
    texts = []

    def backend(gm, inputs):
        look(gm, inputs)
        texts.append(fingerprint(gm, inputs))
        return gm

    for mask in (above(-INF), banded(-INF), above(-INF)):
        torch._dynamo.reset()
        torch.compile(Holding(added, mask), backend=backend)(**heads())
    assert texts[0] == texts[2] != texts[1]
