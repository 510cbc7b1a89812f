"""The templates for the gradient of an embedding table in Triton's interpreter, against float64."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

from iocompiler.cost_model.embedding import CHUNK, Tiles
from iocompiler.runtime import embedding_gradient
from iocompiler.runtime.embedding_gradient import accumulate

ROWS = 19

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


def _random(count: int) -> Tensor:
    return torch.randint(0, ROWS, (count,))


def _half_padding(count: int) -> Tensor:
    return torch.where(torch.rand(count) < 0.5, 3, _random(count))


def _to_the_border(count: int) -> Tensor:
    """Each row as often as a chunk is long: no sum reaches over a border."""
    return (torch.arange(count) // CHUNK)[torch.randperm(count)] % ROWS


def _over_each_border(count: int) -> Tensor:
    """Sums begin in the middle of a chunk, span two or three, and end in the middle."""
    return ((torch.arange(count) + CHUNK // 2) // (2 * CHUNK))[torch.randperm(count)] % ROWS


def _none_inside(count: int) -> Tensor:
    return torch.where(torch.arange(count) % 2 == 0, -1 - _random(count), ROWS + _random(count))


PATTERNS: dict[str, Callable[[int], Tensor]] = {
    "random": _random,
    "all equal": lambda count: torch.full((count,), 7),
    "half padding": _half_padding,
    "to the border": _to_the_border,
    "over each border": _over_each_border,
    "none inside": _none_inside,
    "some outside": lambda count: torch.randint(-ROWS, 2 * ROWS, (count,)),
}


def expected(table: Tensor, grad: Tensor, indices: Tensor, padding: int) -> Tensor:
    kept = (indices >= 0) & (indices < table.shape[0]) & (indices != padding)
    return table.double().index_add(0, indices[kept].long(), grad[kept].double())


def check(
    indices: Tensor,
    *,
    width: int = 5,
    dtype: torch.dtype = torch.float32,
    padding: int = -1,
    added: bool = False,
    stride: int = 0,
) -> None:
    count = indices.shape[0]
    grad = torch.randn(count, max(width, stride)).to(dtype)[:, :width]
    table = torch.randn(ROWS, width).to(dtype) if added else torch.zeros(ROWS, width, dtype=dtype)
    sums = expected(table, grad, indices, padding)
    standing = table.clone()
    accumulate(table, grad, indices, padding, added=added)
    # rounded once: what the float32 sum is off, and half a place of the dtype; the interpreter cuts
    # bfloat16 off
    place = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
    allowed = sums.abs() * place + 1e-5
    assert ((table.double() - sums).abs() <= allowed).all()
    untouched = torch.ones(ROWS, dtype=torch.bool)
    untouched[indices[(indices >= 0) & (indices < ROWS) & (indices != padding)].long()] = False
    assert torch.equal(table[untouched], standing[untouched])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("added", [False, True])
def test_patterns(pattern: str, added: bool) -> None:
    torch.manual_seed(0)
    check(PATTERNS[pattern](4 * CHUNK + 3), added=added, padding=3 if "half" in pattern else -1)


@pytest.mark.parametrize("pattern", ["random", "some outside"])
def test_put_in_order_by_the_library(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    embedding_gradient._launches.cache_clear()
    monkeypatch.setattr(embedding_gradient, "by_counting", lambda tokens, row: False)
    check(PATTERNS[pattern](4 * CHUNK + 3))
    embedding_gradient._launches.cache_clear()


@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_counts(count: int) -> None:
    torch.manual_seed(1)
    check(_random(count))
    check(torch.full((count,), ROWS - 1), added=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_dtypes(dtype: torch.dtype, index: torch.dtype) -> None:
    torch.manual_seed(2)
    check(_half_padding(40).to(index), dtype=dtype, added=True, width=3, stride=7)


def test_rows_wider_than_a_program_and_no_columns() -> None:
    torch.manual_seed(3)
    check(_half_padding(CHUNK + 5), width=130)
    check(_random(4), width=0)


def test_more_chunks_than_are_folded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over 7 borders; tokens of many tiles, in front of and behind a program's own."""
    torch.manual_seed(4)
    embedding_gradient._launches.cache_clear()
    monkeypatch.setattr(embedding_gradient, "_CHUNKS_AT_ONCE", 4)
    few = Tiles(counted=16, others=32, ahead=2, columns=2)
    monkeypatch.setattr(embedding_gradient, "tiles", lambda *of: few)
    check(torch.where(torch.arange(250) % 2 == 0, 3, _random(250)), width=2)
    embedding_gradient._launches.cache_clear()


def test_one_row_read_by_all_tokens() -> None:
    """The gradient of a sum: expanded, of stride 0."""
    indices = _random(37)
    table = torch.zeros(ROWS, 4)
    accumulate(table, torch.ones(1, 4).expand(37, 4), indices, -1, added=False)
    assert torch.equal(table[:, 0], torch.bincount(indices, minlength=ROWS).float())


def test_what_is_not_finite_stays_in_its_row() -> None:
    indices = torch.tensor([0, 1, 1, 0, 2, 4])
    grad = torch.tensor([1.0, torch.inf, 1.0, 2.0, torch.nan, -0.0])[:, None].expand(6, 2)
    table = torch.zeros(ROWS, 2)
    accumulate(table, grad.contiguous(), indices, -1, added=False)
    wanted = torch.tensor([3.0, torch.inf, torch.nan, 0.0, -0.0, 0.0])[:, None].expand(6, 2)
    torch.testing.assert_close(table[:6], wanted, rtol=0, atol=0, equal_nan=True)


def test_the_order_is_stable() -> None:
    """Tokens of a row are added one after another: large ones cancel before the small is added."""
    indices, grad = torch.zeros(3, dtype=torch.int64), torch.tensor([[1e8], [-1e8], [1.0]])
    table = torch.zeros(1, 1)
    accumulate(table, grad, indices, -1, added=False)
    assert table.item() == 1.0
