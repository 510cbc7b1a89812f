"""Logits that are kept and not differentiated: made in the rows behind them, copied to theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iocompiler.ops import linear_cross_entropy_chunks as chunks
from iocompiler.ops import linear_cross_entropy_copied as copied
from iocompiler.ops.linear_cross_entropy import LOSSES
from iocompiler.ops.linear_cross_entropy_products import ROWS
from iocompiler.ops.linear_cross_entropy_rows import Piece, Rows, Setting, reference_rows
from iocompiler.ops.linear_cross_entropy_walk import ALIGNED, LINE

SETTING = Setting(smoothing=0.1, outer=0.7)


@pytest.mark.parametrize("vocabulary", [1, 7, 63, 65, 303, 5003, 50257, 128257])
@pytest.mark.parametrize("scratch", [1, 1 << 20, 1 << 26])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_no_chunk_is_made_where_rows_are(
    vocabulary: int, scratch: int, itemsize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copied, "SCRATCH_BYTES", scratch)
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    for rows in [*range(1, 700), 1000, 1024, 2047, 8191, 8192, 8193, 100_000]:
        kept = torch.empty(rows, vocabulary, dtype=dtype, device="meta")
        done = 0
        found = copied.chunks_of(rows, vocabulary, itemsize)
        for some in found:
            assert some.start == done < some.stop
            assert some.start % ROWS == 0
            made = copied.made_in(kept, some)
            assert made.is_contiguous()
            assert made.shape[0] == some.stop - some.start
            done = some.stop
            if some is not found[-1]:
                begin = made.storage_offset()
                assert done * vocabulary <= begin
                assert begin + made.numel() <= rows * vocabulary
                assert begin * itemsize % ALIGNED == 0
                assert made.untyped_storage()._cdata == kept.untyped_storage()._cdata
        assert done == rows
        assert made.untyped_storage()._cdata != kept.untyped_storage()._cdata
        assert made.shape[0] < 2 * ROWS or made.numel() * itemsize <= scratch


def test_chunks_are_as_large_as_they_can_be() -> None:
    for rows, sizes in ((0, []), (300, [300]), (8192, [4096, 2048, 1024, 512, 512])):
        found = copied.chunks_of(rows, 50257, 2)
        assert [some.stop - some.start for some in found] == sizes


def _inputs(
    rows: int, vocabulary: int, dtype: torch.dtype, bias: bool, device: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 40).to(device, dtype) for n in (rows, vocabulary))
    target = torch.randint(0, vocabulary, (rows,))
    target[1::5] = -100
    return x, weight, torch.randn(vocabulary).to(device, dtype) if bias else None, target.to(device)


@contextmanager
def _memory_is_nan() -> Iterator[None]:
    """In here, what nobody wrote."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _check(rows: int, vocabulary: int, dtype: torch.dtype, bias: bool, device: str) -> None:
    """The logits are what the same products give apart, the losses what those logits have."""
    given = x, weight, b, target = _inputs(rows, vocabulary, dtype, bias, device)
    logits = torch.full((rows, vocabulary), torch.nan, dtype=dtype, device=device)
    losses = chunks.walk(*given, Rows(), SETTING, kept=logits)[0]
    assert torch.equal(logits, _by_parts(x, weight, b))
    exact = torch.empty(rows, dtype=torch.float64, device=device)
    reference_rows(Piece(logits.double(), target, exact), Rows(), SETTING)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)


def _by_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The logits, by the products that the walk is to make."""
    vocabulary = weight.shape[0]
    cut = vocabulary // LINE * LINE
    more = cut + LINE - vocabulary
    last = torch.cat([weight[cut:], weight.new_zeros(more, weight.shape[1])])
    added = None if bias is None else torch.cat([bias[cut:], bias.new_zeros(more)])
    expected = x.new_empty(x.shape[0], vocabulary)
    expected[:, cut:] = _product(x, last, added)[:, : vocabulary - cut]
    for some in copied.chunks_of(x.shape[0], vocabulary, x.element_size()):
        main = weight[:cut], None if bias is None else bias[:cut]
        expected[some, :cut] = _product(x[some], *main)
    return expected


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 1000, 2048])
@pytest.mark.parametrize("vocabulary", [7, 63, 65, 303])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_and_losses(
    rows: int, vocabulary: int, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copied, "SCRATCH_BYTES", 1)
    with _memory_is_nan():
        _check(rows, vocabulary, dtype, bias, "cpu")


class _Allocated(TorchDispatchMode):
    """The bytes that are allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        known |= {t.untyped_storage()._cdata for t in (kwargs or {}).values() if torch.is_tensor(t)}
        out = f(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage()._cdata not in known:
            self.bytes += out.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("rows", [1, 300, 1000])
@pytest.mark.parametrize("vocabulary", [7, 303])
def test_nothing_but_the_scratch_is_allocated(
    rows: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copied, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(copied, "evaluate", lambda *_: None)  # the reference is not a kernel
    x, weight, _, target = _inputs(rows, vocabulary, torch.bfloat16, False, "cpu")
    kept = torch.empty(rows, vocabulary, dtype=torch.bfloat16)
    with _Allocated() as seen:
        losses = chunks.walk(x, weight, None, target, Rows(), SETTING, kept=kept)[0]
    said = chunks.scratch_bytes(rows, vocabulary, 40, 2, gradient=False, kept=True)
    assert seen.bytes == said + losses.untyped_storage().nbytes()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 1000, 2048])
@pytest.mark.parametrize("vocabulary", [7, 63, 1001, 30522, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_and_losses_on_the_gpu(
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if vocabulary * dtype.itemsize % ALIGNED == 0:
        pytest.skip("aligned: made in place")
    monkeypatch.setattr(copied, "SCRATCH_BYTES", 1)
    _check(rows, vocabulary, dtype, bias, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("vocabulary", "bias"), [(50257, False), (30522, True)])
def test_the_peak_on_the_gpu(vocabulary: int, bias: bool) -> None:
    given = _inputs(4096, vocabulary, torch.bfloat16, bias, "cuda")

    def run() -> None:
        LOSSES(*given, None, None, -100, 0.0, 1.0, 1.0, False, True)

    run()  # libraries have their workspaces from here on
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    scratch = chunks.scratch_bytes(4096, vocabulary, 40, 2, gradient=False, kept=True)
    assert scratch < 1.1 * copied.SCRATCH_BYTES
    allowed = 4096 * vocabulary * 2 + scratch + (4 << 20)
    assert torch.cuda.max_memory_allocated() - before <= allowed
