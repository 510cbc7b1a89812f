"""Attention as a score program: the spellings libraries take too, told to be programs, and those
that only a program says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.ops.scored_attention import FORWARD
from iocompiler.passes.attention.running import choice
from iocompiler.tile.score import ScoreProgram, parsed
from tests.accuracy import assert_as_accurate_as_eager
from tests.passes.attention_cases import Compiled, Spelling, heads
from tests.passes.test_attention_taken import (
    cases,
    causal_clamped,
    causal_inf,
    causal_logarithm,
    causal_tutorial,
    padding_and_causal,
    window,
    window_added,
)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attention is made a program, as on a GPU those are that have a mask or a bias."""
    monkeypatch.setattr(choice, "wanted", lambda call, found: not found.dropout_p)


def check(function: Callable[..., Any], inputs: dict[str, Tensor], dtype: torch.dtype) -> Compiled:
    made: list[Compiled] = []

    def compile_(module: Spelling) -> Compiled:
        made.append(Compiled(module))
        return made[0]

    assert_as_accurate_as_eager(lambda: Spelling(function), inputs, compile_, dtype=dtype)
    assert len(made[0].variants) == 1, made[0].misses
    assert made[0].variants[0].startswith("program")
    return made[0]


def programs(compiled: Compiled) -> list[ScoreProgram]:
    nodes = [n for graph in compiled.graphs for n in graph.graph.nodes if n.target is FORWARD]
    return [parsed(node.args[5]) for node in nodes]


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("function", "variant", "inputs"), cases())
def test_whatever_a_library_takes(
    function: Callable[..., Any], variant: str, inputs: dict[str, Tensor], dtype: torch.dtype
) -> None:
    check(function, inputs, dtype)


def above(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)


def softcap(q, k, v):
    s = torch.tanh(q @ k.mT / 30.0) * 30.0
    return s.masked_fill(above(s), float("-inf")).softmax(-1) @ v


def masked_before_softcap(q, k, v):
    s = (q @ k.mT).masked_fill(above(q @ k.mT), float("-inf"))
    return (torch.tanh(s / 5.0) * 5.0).softmax(-1) @ v


def scores_times_tensor(q, k, v):
    s = q @ k.mT
    return (s * torch.arange(s.shape[-1])).softmax(-1) @ v


def mask_to_zero(q, k, v):
    s = q @ k.mT
    return s.masked_fill(above(s), 0.0).softmax(-1) @ v


def mild_mask(q, k, v):
    s = q @ k.mT
    return s.masked_fill(above(s), -10.0).softmax(-1) @ v


def clamped(q, k, v):
    return (q @ k.mT).clamp(-1.0, 2.0).softmax(-1) @ v


def finite_after_all(q, k, v):
    s = (q @ k.mT).masked_fill(above(q @ k.mT), float("-inf"))
    return torch.max(s, torch.tensor(torch.finfo(s.dtype).min)).softmax(-1) @ v


def rectified(q, k, v):
    return F.relu(q @ k.mT).pow(2).softmax(-1) @ v


def alibi(q, k, v):
    s = q @ k.mT * 0.3
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    distance = torch.arange(s.shape[-1]) - torch.arange(s.shape[-2])[:, None]
    s = s + slopes[:, None, None] * distance
    return s.masked_fill(above(s), float("-inf")).softmax(-1).to(v.dtype) @ v


def learned_slopes(q, k, v, slopes):
    s = q @ k.mT * 0.3
    distance = torch.arange(s.shape[-1]) - torch.arange(s.shape[-2])[:, None]
    return (s - slopes[:, None, None] * distance.abs()).softmax(-1) @ v


def buckets(distance: Tensor) -> Tensor:
    n = (-distance).clamp_min(0)
    large = 4 + (torch.log(n.float().clamp_min(1) / 4) / math.log(4.0) * 4).long()
    return torch.where(n < 4, n, large.clamp_max(7))


def relative(q, k, v, table):
    s = q @ k.mT * 0.3
    distance = torch.arange(s.shape[-1])[None, :] - torch.arange(s.shape[-2])[:, None]
    s = s + F.embedding(buckets(distance), table).permute(2, 0, 1).unsqueeze(0)
    return s.masked_fill(above(s), float("-inf")).softmax(-1) @ v


def relative_shared(q, k, v, table):
    s = q @ k.mT * 0.3
    distance = torch.arange(s.shape[-2])[:, None] - torch.arange(s.shape[-1])[None, :]
    return (s + F.embedding(buckets(distance), table[:, :1]).squeeze(-1)).softmax(-1) @ v


def documents(q, k, v, ids):
    s = q @ k.mT * 0.3
    other = ids[:, None, :, None] != ids[:, None, None, :]
    return s.masked_fill(other | above(s), float("-inf")).softmax(-1) @ v


def prefix(q, k, v, lengths):
    s = q @ k.mT * 0.3
    i, j = torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])
    keep = (j <= i) | (j < lengths[:, None, None, None])
    return torch.where(keep, s, -1e9).softmax(-1) @ v


def dilated(q, k, v):
    s = q @ k.mT * 0.3
    i, j = torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])
    return s.masked_fill((i == j).logical_not() & ((i < j) | (i - j > 3)), -1e9).softmax(-1) @ v


def two_finite_masks(q, k, v, padding):
    s = (q @ k.mT).masked_fill(above(q @ k.mT), -1e9)
    return (s + padding[:, None, None, :]).softmax(-1) @ v


def library_block_mask(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def _only() -> list[Any]:
    square, cross = heads(), heads(columns=9)
    table = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 3]])
    padding = torch.zeros(2, 7).index_fill(1, torch.arange(3), -1e9)
    keep = torch.rand(7, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    keep[3] = False
    table_of = {**square, "table": table}
    told_only = [
        (softcap, square),
        (masked_before_softcap, square),
        (scores_times_tensor, square),
        (mask_to_zero, square),
        (mild_mask, cross),
        (clamped, square),
        (finite_after_all, square),
        (rectified, square),
        (alibi, cross),
        (learned_slopes, {**square, "slopes": torch.rand(4).requires_grad_()}),
        (relative, table_of),
        (relative, {**cross, "table": table}),
        (relative_shared, table_of),
        (documents, {**square, "ids": ids}),
        (prefix, {**square, "lengths": torch.tensor([2, 5])}),
        (dilated, square),
        (two_finite_masks, {**square, "padding": padding}),
        (library_block_mask, {**square, "keep": keep}),
    ]
    return [
        pytest.param(f, x, id=f"{f.__name__}-{x['q'].shape[2]}x{x['k'].shape[2]}")
        for f, x in told_only
    ]


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("function", "inputs"), _only())
def test_what_only_a_program_says(
    function: Callable[..., Any], inputs: dict[str, Tensor], dtype: torch.dtype
) -> None:
    check(function, inputs, dtype)


def softcap_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = 20.0 * torch.tanh((q @ k.mT).float() / 20.0)
    return s.softmax(-1).to(v.dtype) @ v


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize(
    ("function", "dtype", "is_coarse"),
    [
        (softcap, torch.bfloat16, True),
        (softcap, torch.float16, False),
        (softcap, torch.float32, False),
        (softcap_in_float32, torch.bfloat16, False),
    ],
)
def test_a_tanh_is_as_coarse_as_what_it_is_rounded_to(
    function: Callable[..., Tensor], dtype: torch.dtype, is_coarse: bool
) -> None:
    (program,) = programs(check(function, heads(2, 3, 40, 40, 16), dtype))
    assert [op.fn for op in program.ops if "tanh" in op.fn] == [
        "coarse_tanh" if is_coarse else "tanh"
    ]


@pytest.mark.parametrize("function", [softcap, mask_to_zero, clamped])
def test_taken_untold_where_no_library_does(function: Callable[..., Any]) -> None:
    check(function, heads(), torch.float32)


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize(
    "function", [causal_inf, window, padding_and_causal, softcap, alibi, relative, documents]
)
def test_lengths_change_without_recompiling(function: Callable[..., Any]) -> None:
    compiled = Compiled(function, dynamic=True)
    for batch, length in ((6, 7), (3, 11), (5, 130)):
        inputs = heads(batch=batch, rows=length, columns=length)
        if function is padding_and_causal:
            inputs["mask"] = torch.zeros(batch, length)
        if function is relative:
            inputs["table"] = torch.randn(8, 4).requires_grad_()
        if function is documents:
            inputs["ids"] = torch.randint(0, 3, (batch, length)).sort(-1)[0]
        torch.testing.assert_close(compiled(**inputs), function(**inputs))
    assert len(compiled.graphs) == 1
    assert compiled.variants[0].startswith("program")


@pytest.mark.usefixtures("told")
def test_structure_reads_no_tensor() -> None:
    spellings = (causal_clamped, causal_logarithm, causal_tutorial, window_added)
    for function in (causal_inf, window, softcap, alibi, dilated, *spellings):
        (program,) = programs(check(function, heads(), torch.float32))
        assert program.keep is not None
        assert program.loads(program.keep) == ()


@pytest.mark.usefixtures("told")
def test_buckets_are_looked_up_once_a_distance() -> None:
    inputs = {**heads(), "table": torch.randn(8, 4).requires_grad_()}
    compiled = check(relative, inputs, torch.float32)
    (call,) = (n for graph in compiled.graphs for n in graph.graph.nodes if n.target is FORWARD)
    assert [tuple(each.meta["val"].shape) for each in call.args[3]] == [(4, 13)]


@pytest.mark.usefixtures("told")
def test_a_bias_used_as_a_mask_keeps_fully_masked_rows() -> None:
    """Of finfo.min everywhere the softmax is uniform, of -inf it is NaN, as in eager."""

    def function(q, k, v, added):
        return (q @ k.mT + added[:, None]).softmax(-1) @ v

    for value in (torch.finfo(torch.float32).min, float("-inf")):
        added = torch.zeros(2, 7, 7)
        added[:, 3] = value
        added[:, :, 5] = value
        inputs = {**{n: x.detach() for n, x in heads().items()}, "added": added}
        compiled = Compiled(function)
        expected = function(**inputs)
        torch.testing.assert_close(compiled(**inputs), expected, equal_nan=True)
        assert compiled.variants == ["program+score"]
        assert bool(expected.isnan().any()) == (value == float("-inf"))


@pytest.mark.usefixtures("told")
def test_a_library_call_gives_zeros_for_rows_without_keys() -> None:
    keep = torch.ones(7, 7, dtype=torch.bool)
    keep[3] = False
    inputs = {**{n: x.detach() for n, x in heads().items()}, "keep": keep}
    out = Compiled(library_block_mask)(**inputs)
    assert torch.equal(out[:, :, 3], torch.zeros_like(out[:, :, 3]))


def of_documents(positions: Tensor, q, k, v):
    """Hugging Face's mask of packed documents: a document begins where positions do not go on."""
    begins = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
    ids = begins.cumsum(-1)
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
    keep = (j >= 0) & (j <= i) & (j > i - 3) & (ids[:, :, None] == ids[:, None, :])[:, None]
    return (q @ k.mT * 0.3 + torch.where(keep, 0.0, -1e30).to(q.dtype)).softmax(-1) @ v


def one_document(q, k, v):
    return of_documents(torch.arange(q.shape[-2])[None], q, k, v)


def given_documents(q, k, v, positions):
    return of_documents(positions, q, k, v)


@pytest.mark.usefixtures("told")
def test_what_is_proved_of_a_mask_is_not_loaded() -> None:
    (program,) = programs(check(one_document, heads(), torch.float32))
    assert program.loads(program.keep) == ()
    assert program.empty == "nan"  # each row keeps a key: none is a mean of the values
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]])
    inputs = {**heads(), "positions": positions}
    (program,) = programs(check(given_documents, inputs, torch.float32))
    assert len(program.loads(program.keep)) == 2


def sloped(slopes: Tensor, q, k, v):
    s = q @ k.mT * 0.3 + slopes[:, None, None] * torch.arange(1 - k.shape[-2], 1)
    return s.to(q.dtype).masked_fill(above(s), torch.finfo(q.dtype).min).softmax(-1) @ v


def powers_of_two(q, k, v):
    return sloped(1.0 / torch.pow(2, torch.arange(1, 5).float() * 2.0), q, k, v)


def powers_put_together(q, k, v):
    """MPT's, for a number of heads that is no power of two."""
    slopes = 1.0 / torch.pow(2, torch.arange(1, 9).float() * 0.5)
    return sloped(torch.cat([slopes[1::2], slopes[::2]])[:4], q, k, v)


def any_slopes(q, k, v, slopes):
    return sloped(slopes, q, k, v)


@pytest.mark.usefixtures("told")
def test_a_finite_mask_is_structure_beside_slopes_known_to_be_small() -> None:
    for function in (powers_of_two, powers_put_together):
        (program,) = programs(check(function, heads(), torch.float32))
        assert program.keep is not None
    inputs = {**heads(), "slopes": torch.rand(4) * 10}
    compiled = Compiled(any_slopes)
    torch.testing.assert_close(compiled(**inputs), any_slopes(**inputs))
    assert [program.keep for program in programs(compiled)] == [None]
