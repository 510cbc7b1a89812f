"""Scores that are a sum of products: one product over the widths put together where they are of the
same rows and columns, else a bias; and what is declined, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.passes.attention.running import choice
from tests.accuracy import assert_as_accurate_as_eager
from tests.passes.attention_cases import Compiled, Spelling
from tests.passes.test_attention_programs import programs

BATCH, HEADS, LENGTH, WIDTH, TURNED = 2, 4, 19, 8, 4


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).requires_grad_()


def parts(length: int = LENGTH, batch: int = BATCH, value: int = WIDTH) -> dict[str, Tensor]:
    """Queries and keys without positions, and with; these keys are shared by all heads."""
    return {
        "q": draw(batch, HEADS, length, WIDTH),
        "k": draw(batch, HEADS, length, WIDTH),
        "r": draw(batch, HEADS, length, TURNED),
        "s": draw(batch, 1, length, TURNED),
        "v": draw(batch, HEADS, length, value),
    }


def plain(q, k, r, s, v):
    return ((q @ k.mT + r @ s.mT) * 0.3).softmax(-1) @ v


def causal(q, k, r, s, v):
    x = (q @ k.mT + r @ s.mT) * 0.3
    hidden = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1)
    return x.masked_fill(hidden, float("-inf")).softmax(-1) @ v


def scaled_apart(q, k, r, s, v):
    return ((q @ k.mT) * 0.3 - (r @ s.mT) / 2.5).softmax(-1) @ v


def scaled_by_a_tensor(q, k, r, s, v):
    return (q @ k.mT * 0.3 + r @ s.mT * v[0, 0, 0, 0].exp()).softmax(-1) @ v


def einsums(q, k, r, s, v):
    q, k, r, v = (x.transpose(1, 2) for x in (q, k, r, v))
    without = torch.einsum("bihd,bjhd->bihj", q, k)
    turned = torch.einsum("bihd,bjd->bihj", r, s[:, 0])
    return torch.einsum("bihj,bjhd->bihd", ((without + turned) * 0.3).softmax(-1), v)


def three(q, k, r, s, v):
    return (q @ k.mT * 0.3 + r @ s.mT + q @ v.mT * 0.1).softmax(-1) @ v


def transposed(q, k, r, s, v):
    return (q @ k.mT * 0.3 + (s @ r.mT).mT).softmax(-1) @ v


def one_pattern_for_all(q, k, r, s, v):
    return (q @ k.mT * 0.3 + r[:1] @ s[:1].mT).softmax(-1) @ v


def batched(q, k, r, s, v):
    b, h, n, _ = q.shape
    q, k, r, s, v = (x.expand(b, h, -1, -1).reshape(b * h, n, -1) for x in (q, k, r, s, v))
    x = torch.baddbmm(torch.bmm(q, k.mT), r, s.mT, beta=0.3, alpha=0.5)
    return torch.bmm(x.softmax(-1), v).view(b, h, n, -1)


def biased_before(q, k, r, s, v):
    x = (q @ k.mT + torch.arange(q.shape[-2])) * 0.3
    return (x + r @ s.mT).softmax(-1).to(v.dtype) @ v


TAKEN = [
    (plain, "full"),
    (causal, "causal"),
    (scaled_apart, "full"),
    (scaled_by_a_tensor, "full"),
    (einsums, "full"),
    (three, "full"),
    (transposed, "full"),
    (one_pattern_for_all, "full"),
    (batched, "full"),
    (biased_before, "program+score"),
]


def check(function: Callable[..., Any], inputs: dict[str, Tensor], dtype: torch.dtype) -> Compiled:
    made: list[Compiled] = []

    def compile_(module: Spelling) -> Compiled:
        made.append(Compiled(module))
        return made[0]

    assert_as_accurate_as_eager(lambda: Spelling(function), inputs, compile_, dtype=dtype)
    return made[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("function", "variant"), TAKEN)
def test_taken(function: Callable[..., Any], variant: str, dtype: torch.dtype) -> None:
    compiled = check(function, parts(), dtype)
    assert compiled.variants == [variant], compiled.misses
    assert compiled.misses == []
    for node in compiled.graphs[0].graph.nodes:  # no matrix of scores is left
        value = node.meta.get("val")
        assert not isinstance(value, Tensor) or value.shape[-2:] != (LENGTH, LENGTH)


@pytest.mark.parametrize("function", [plain, einsums])
def test_as_a_program(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Values may be narrower than queries, as DeepSeek's are."""
    monkeypatch.setattr(choice, "wanted", lambda call, found: True)
    assert check(function, parts(value=6), torch.float32).variants == ["program"]


def test_absorbed() -> None:
    """Keys and values are one latent that all heads share."""

    def function(q, c, r, s):
        x = torch.einsum("bihd,bjd->bihj", q, c) + torch.einsum("bihd,bjd->bihj", r, s)
        return torch.einsum("bihj,bjd->bihd", (x * 0.3).softmax(-1), c)

    length = 40
    inputs = {
        "q": draw(BATCH, length, HEADS, 16),
        "c": draw(BATCH, length, 16),
        "r": draw(BATCH, length, HEADS, TURNED),
        "s": draw(BATCH, length, TURNED),
    }
    assert check(function, inputs, torch.float32).variants == ["gqa"]


@pytest.mark.parametrize("function", [plain, causal, einsums, batched])
def test_lengths_change_without_recompiling(function: Callable[..., Any]) -> None:
    compiled = Compiled(function, dynamic=True)
    for batch, length in ((6, 19), (3, 31), (5, 130)):
        inputs = parts(length, batch)
        torch.testing.assert_close(compiled(**inputs), function(**inputs))
    assert len(compiled.graphs) == 1
    assert len(compiled.variants) == 1


def relative(q, k, v, table):
    return ((q @ k.mT + torch.einsum("bhid,ijd->bhij", q, table)) * 0.3).softmax(-1) @ v


def relative_first(q, k, v, table):
    return ((torch.einsum("bhid,ijd->bhij", q, table) - 2 * (q @ k.mT)) * 0.3).softmax(-1) @ v


def shifted(q, k, v, table):
    """The relative shift of Transformer-XL and XLNet."""
    b, h, n, _ = q.shape
    x = F.pad(q @ table[0].mT, (1, 0)).reshape(b, h, n + 1, n)[:, :, 1:]
    return ((q @ k.mT + x + 0) * 0.3).softmax(-1) @ v


@pytest.mark.parametrize("function", [relative, relative_first, shifted])
def test_a_product_with_positions_relative_to_the_query_is_a_bias(
    function: Callable[..., Any],
) -> None:
    shapes = {"q": WIDTH, "k": WIDTH, "v": WIDTH}
    inputs = {name: draw(BATCH, HEADS, LENGTH, width) for name, width in shapes.items()}
    inputs["table"] = draw(LENGTH, LENGTH, WIDTH)
    compiled = check(function, inputs, torch.float32)
    assert compiled.variants == ["bias"], compiled.misses


def product(q, k, r, s, v):
    return ((q @ k.mT) * (r @ s.mT)).softmax(-1) @ v


def capped(q, k, r, s, v):
    return (q @ k.mT + torch.tanh(r @ s.mT)).softmax(-1) @ v


def dtypes(q, k, r, s, v):
    return (q @ k.mT + (r.double() @ s.double().mT).to(q.dtype)).softmax(-1) @ v


def returned(q, k, r, s, v):
    x = q @ k.mT + r @ s.mT
    return x.softmax(-1) @ v, x


def written_between(q, k, r, s, v):
    r, s = r * 1.0, s * 1.0
    x = r @ s.mT
    s[:, :, 3:].zero_()
    return (q @ k.mT + x).softmax(-1) @ v


def one_query(q, k, r, s, v):
    return plain(q[:, :, :1], k, r[:, :, :1], s, v)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (product, "a product or a quotient of two contractions"),
        (capped, "changed before it is added"),
        (dtypes, "in several dtypes"),
        (returned, "is returned elsewhere"),
        (written_between, "written between the parts"),
        (one_query, "put together would move"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_declined(function: Callable[..., Any], reason: str, grad: bool) -> None:
    compiled, inputs = Compiled(function), parts()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(**inputs), function(**inputs))
    assert compiled.variants == []
    assert reason in compiled.misses[0]
    targets = {node.target for node in compiled.graphs[0].graph.nodes}
    assert torch.ops.aten.cat.default not in targets
    assert torch.ops.aten.positive.default not in targets


def decomposed(q, k, v, rows, columns):
    """A bias of the row and of the column that a key lies in, each a product with the query."""
    b, h, n, d = q.shape
    lies = q.reshape(b, h, 4, 4, d)
    of_rows = torch.einsum("bhxyd,xkd->bhxyk", lies, rows)
    of_columns = torch.einsum("bhxyd,ykd->bhxyk", lies, columns)
    bias = (of_rows[..., None] + of_columns[..., None, :]).reshape(b, h, n, n)
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


@pytest.mark.parametrize("as_program", [False, True])
def test_products_smaller_than_the_scores_are_biases(
    as_program: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in SAM: put together along the width, the operands would be more than the scores."""
    if as_program:
        monkeypatch.setattr(choice, "wanted", lambda call, found: True)
    inputs = {name: draw(BATCH, HEADS, 16, WIDTH) for name in "qkv"}
    inputs |= {"rows": draw(4, 4, WIDTH), "columns": draw(4, 4, WIDTH)}
    compiled = check(decomposed, inputs, torch.float32)
    assert compiled.variants == ["program+score" if as_program else "bias"], compiled.misses


def gathered(q, k, v, table, places):
    """DeBERTa's: of a product with each distance there is, that of the key's."""
    of_each = torch.einsum("bhid,td->bhit", q, table[0])
    picked = of_each.gather(-1, places.expand(*q.shape[:2], -1, -1))
    return (q @ k.mT * 0.3 + picked).softmax(-1) @ v


def indexed(q, k, v, table, places):
    """Swin's."""
    return (q @ k.mT * 0.3 + table.sum(-1)[0][places]).softmax(-1) @ v


def argument(q, k, v, table, places):
    return (q @ k.mT * 0.3 + table[..., 0].gather(0, places)).softmax(-1) @ v


@pytest.mark.parametrize(
    ("function", "is_deep"), [(gathered, False), (indexed, True), (argument, True)]
)
def test_products_are_as_small_as_scores(
    function: Callable[..., Any], is_deep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may hold a mask's numbers is kept from overflowing, at the price of a second plane."""
    monkeypatch.setattr(choice, "wanted", lambda call, found: True)
    inputs = {name: draw(BATCH, HEADS, LENGTH, WIDTH) for name in "qkv"}
    inputs["table"] = draw(LENGTH, LENGTH, WIDTH)
    distance = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]
    inputs["places"] = distance.abs().clamp_max(LENGTH - 1)
    compiled = check(function, inputs, torch.float32)
    (program,) = programs(compiled)
    assert program.deep == is_deep


def test_a_learned_table_is_small() -> None:
    class Learning(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(2 * LENGTH))

        def forward(self, q, k, v, places):
            return (q @ k.mT * 0.3 + self.table[places]).softmax(-1) @ v

    inputs = {name: draw(BATCH, HEADS, LENGTH, WIDTH) for name in "qkv"}
    inputs["places"] = torch.randint(0, 2 * LENGTH, (LENGTH, LENGTH))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "wanted", lambda call, found: True)
        module = Learning()
        compiled = Compiled(module)
        torch.testing.assert_close(compiled(**inputs), module(**inputs))
    (program,) = programs(compiled)
    assert not program.deep
