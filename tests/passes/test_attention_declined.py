"""Look-alikes that must be left as they are, with a reason; and what is no attention at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.passes.attention_cases import Compiled, heads


def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def softmax_over_heads(q, k, v):
    return (q @ k.mT).softmax(1) @ v


def probabilities_used(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return p @ v + p.amax(-1, keepdim=True)


def scores_used(q, k, v):
    s = q @ k.mT
    return s.softmax(-1) @ v + s.mean(-1, keepdim=True)


def mask_after_softmax(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return (p * torch.ones(p.shape[-2:]).tril()) @ v


def double_softmax(q, k, v):
    return (q @ k.mT).softmax(-1).softmax(-1) @ v


def unknown_function(q, k, v):
    s = q @ k.mT / 30.0
    return torch.clamp(s, torch.tensor(-1.0), torch.tensor(1.0)).softmax(-1) @ v


def sum_of_products(q, k, v):
    return (q @ k.mT + k @ q.mT).softmax(-1) @ v


def values_on_rows(q, k, v):
    return (q @ k.mT).softmax(-1).mT @ v


def maximum_of_others(q, k, v):
    return torch.maximum(q @ k.mT, torch.zeros(7, 7)).softmax(-1) @ v


def late_division_by_others(q, k, v):
    e = torch.exp(q @ k.mT)
    return (e @ v) / (2 * e).sum(-1, keepdim=True)


def sum_over_queries(q, k, v):
    e = torch.exp(q @ k.mT)
    return (e / e.sum(-2, keepdim=True)) @ v


def sum_unsqueezed_elsewhere(q, k, v):
    e = torch.exp(q @ k.mT)
    return (e / e.sum(-1).unsqueeze(-2)) @ v


def max_over_queries(q, k, v):
    s = q @ k.mT
    e = torch.exp(s - s.amax(-2, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def no_grad_in_between(q, k, v):
    with torch.no_grad():
        p = (q @ k.mT).softmax(-1)
    return p @ v


def written_in_between(q, k, v):
    q = q * 1.0
    s = q @ k.mT
    q.add_(1.0)
    return s.softmax(-1) @ v + q


def dropped_scores(q, k, v):
    return F.dropout(q @ k.mT, 0.5).softmax(-1) @ v


def weighted_average(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return (p / p.sum(-2, keepdim=True)) @ v


def added_to_the_output(q, k, v):
    return torch.addmm(v[0, 1], (q[0, 0] @ k[0, 0].mT).softmax(-1), v[0, 0])


def output_scaled(q, k, v):
    p = (q[0, 0] @ k[0, 0].mT).softmax(-1)
    return torch.addmm(v[0, 1], p, v[0, 0], beta=0, alpha=0.5)


def scores_gathered(q, k, v):
    places = torch.arange(6, -1, -1).expand(2, 4, 7, 7)
    return (q @ k.mT).gather(-1, places).softmax(-1) @ v


def scores_picked(q, k, v):
    return (q @ k.mT)[..., torch.arange(6, -1, -1)].softmax(-1) @ v


def scores_normalised(q, k, v):
    return F.layer_norm(q @ k.mT, (7,)).softmax(-1) @ v


NEARLY = [
    scores_gathered,
    scores_picked,
    scores_normalised,
    added_to_the_output,
    output_scaled,
    softmax_over_queries,
    softmax_over_heads,
    probabilities_used,
    scores_used,
    mask_after_softmax,
    double_softmax,
    sum_of_products,
    values_on_rows,
    no_grad_in_between,
    weighted_average,
    maximum_of_others,
]
UNLIKE = [
    sum_over_queries,
    sum_unsqueezed_elsewhere,
    max_over_queries,
    dropped_scores,
    unknown_function,
    late_division_by_others,
]


@pytest.mark.parametrize("function", [*NEARLY, *UNLIKE], ids=lambda f: f.__name__)
def test_declined(function: Callable[..., Any]) -> None:
    compiled, inputs = Compiled(function), heads()
    torch.manual_seed(0)
    out = compiled(**inputs)
    torch.manual_seed(0)
    torch.testing.assert_close(out, function(**inputs))
    assert compiled.variants == []
    assert compiled.calls == []
    if function in NEARLY:
        assert len(compiled.misses) == 1


def test_a_layer_with_a_softmax_is_no_attention() -> None:
    class Router(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = torch.nn.Linear(8, 5), torch.nn.Linear(5, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts(self.gate(x).softmax(-1))

    router, x = Router(), torch.randn(2, 7, 8)
    compiled = Compiled(router)
    torch.testing.assert_close(compiled(x), router(x))
    assert compiled.findings == []


@pytest.mark.parametrize(
    ("function", "operator"),
    [(scores_gathered, "gather"), (scores_picked, "index"), (scores_normalised, "layer_norm")],
)
def test_what_is_not_understood_is_named_with_its_line(
    function: Callable[..., Any], operator: str
) -> None:
    compiled = Compiled(function)
    compiled(**heads())
    (miss,) = compiled.misses
    assert f"aten.{operator}." in miss
    assert "on the scores, at test_attention_declined.py:" in miss


def test_written_in_between_stays_right() -> None:
    compiled, inputs = Compiled(written_in_between), heads()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), written_in_between(**inputs))


@pytest.mark.parametrize("last", ["write", "copy"])
def test_a_mask_that_is_written_to_is_not_taken_apart(last: str) -> None:
    def function(q, k, v, table):
        keep = torch.ones(7, 7, dtype=torch.bool).tril()
        mask = torch.where(keep, table, torch.finfo(q.dtype).min)
        copy = mask.clone()
        (copy if last == "write" else mask)[:, 5].fill_(0.5)
        return F.scaled_dot_product_attention(q, k, v, copy if last == "write" else mask.clone())

    inputs = {name: x.detach() for name, x in heads().items()} | {"table": torch.randn(7, 7)}
    compiled = Compiled(function)
    torch.testing.assert_close(compiled(**inputs), function(**inputs))
    assert "mask+bias" not in compiled.variants


def test_integer_query_is_declined() -> None:
    q, k = (torch.randint(-3, 3, (2, 4, 7, 8)) for _ in range(2))

    def function(q, k):
        return (q @ k.mT).softmax(-1, dtype=torch.float32) @ k.float()

    compiled = Compiled(function)
    torch.testing.assert_close(compiled(q, k), function(q, k))
    assert compiled.variants == []
    assert len(compiled.misses) == 1


def test_a_finite_mask_that_may_hide_a_whole_row_keeps_the_row_uniform() -> None:
    """Over a row of finfo.min the softmax is uniform; -inf there would give NaN or zeros."""

    def function(q, k, v, keep):
        s = (q @ k.mT).masked_fill(~keep, torch.finfo(q.dtype).min)
        return s.softmax(-1) @ v

    for dtype in (torch.float32, torch.bfloat16):
        inputs = {name: x.detach().to(dtype) for name, x in heads().items()}
        keep = torch.rand(2, 1, 7, 7) > 0.5
        keep[:, :, 3] = False
        compiled = Compiled(function)
        out = compiled(**inputs, keep=keep)
        assert compiled.variants == ["mask"]
        expected = inputs["v"].mean(-2)
        torch.testing.assert_close(out[:, :, 3], expected, atol=1e-2, rtol=1e-2)
    half = {name: x.detach().half() for name, x in heads().items()}
    compiled = Compiled(function)
    exact = function(**{n: x.float() for n, x in half.items()}, keep=keep)
    torch.testing.assert_close(compiled(**half, keep=keep).float(), exact, atol=5e-3, rtol=5e-3)
    assert compiled.variants == ["program+mask"]  # float16 has no bias for such a row


def test_a_causal_finite_mask_with_padding_is_no_structure() -> None:
    """Padding may hide the keys before the diagonal; then eager looks at those after it."""

    def function(q, k, v, padding):
        s = (q @ k.mT).masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -1e9)
        return (s + padding[:, None, None, :]).softmax(-1) @ v

    padding = torch.zeros(2, 7)
    padding[:, :3] = -1e9
    inputs = {name: x.detach() for name, x in heads().items()}
    compiled = Compiled(function)
    torch.testing.assert_close(
        compiled(**inputs, padding=padding), function(**inputs, padding=padding)
    )
    assert compiled.variants == ["mask+bias"]


def test_a_causal_mask_counted_from_the_end_is_no_causal() -> None:
    def function(q, k, v):
        s = q @ k.mT
        keep = torch.ones(s.shape[-2:], dtype=torch.bool).tril(s.shape[-1] - s.shape[-2])
        return s.masked_fill(~keep, float("-inf")).softmax(-1) @ v

    inputs = {name: x.detach() for name, x in heads(rows=5, columns=9).items()}
    compiled = Compiled(function)
    torch.testing.assert_close(compiled(**inputs), function(**inputs))
    assert compiled.variants == ["mask"]


def test_decoding_one_query_sees_every_key() -> None:
    def function(q, k, v):
        s = q @ k.mT
        keep = torch.ones(s.shape[-2:], dtype=torch.bool).tril(s.shape[-1] - s.shape[-2])
        return s.masked_fill(~keep, float("-inf")).softmax(-1) @ v

    inputs = {name: x.detach() for name, x in heads(rows=1, columns=9).items()}
    compiled = Compiled(function)
    torch.testing.assert_close(compiled(**inputs), function(**inputs))
    assert compiled.variants == ["full"]


def test_nothing_is_said_of_what_is_no_attention() -> None:
    compiled = Compiled(lambda x, w: F.softmax(x @ w, -1))
    compiled(torch.randn(3, 4), torch.randn(4, 5))
    assert compiled.findings == []
