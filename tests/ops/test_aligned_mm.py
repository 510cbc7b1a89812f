"""Odd matrix products in aligned parts are the same products."""

from __future__ import annotations

import pytest
import torch

from iocompiler.ops import aligned_mm


@pytest.mark.parametrize(
    "extents", [(130, 70, 129), (64, 64, 50), (5, 7, 9), (128, 64, 128), (3, 200, 64), (1, 1, 1)]
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", ["padded", "exact", "exact, in many pieces"])
def test_is_as_accurate_as_mm(
    extents: tuple[int, int, int],
    transposed: bool,
    with_bias: bool,
    rows: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m, k, n = extents
    row = n if rows.startswith("exact") else -(-n // 64) * 64
    if rows.endswith("pieces"):
        monkeypatch.setattr(aligned_mm, "SCRATCH_BYTES", 1)
        monkeypatch.setattr(aligned_mm, "TILE", 16)
    a = torch.randn(m, k, dtype=torch.bfloat16)
    b = (
        torch.randn(n, k, dtype=torch.bfloat16).t()
        if transposed
        else torch.randn(k, n, dtype=torch.bfloat16)
    )
    bias = torch.randn(n, dtype=torch.bfloat16) if with_bias else None
    out = torch.ops.iocompiler.aligned_mm(a, b, bias, row)
    exact = a.double() @ b.double() + (0 if bias is None else bias.double())
    eager = a @ b if bias is None else torch.addmm(bias, a, b)
    assert out.shape == (m, n)
    assert out.stride() == (row, 1)
    assert (out - exact).norm() <= 2 * (eager - exact).norm() + 1e-5 * exact.norm()


def test_nothing_to_sum_gives_the_bias() -> None:
    a, b, bias = torch.empty(4, 0), torch.empty(0, 5), torch.randn(5)
    assert torch.equal(torch.ops.iocompiler.aligned_mm(a, b, bias, 5), bias.expand(4, 5))
    assert torch.equal(torch.ops.iocompiler.aligned_mm(a, b, None, 5), torch.zeros(4, 5))


def test_the_fake_implementation_promises_the_real_strides() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        a, b = torch.empty(6, 7), torch.empty(7, 9)
        out = torch.ops.iocompiler.aligned_mm(a, b, None, 16)
    assert out.stride() == (16, 1)
    assert out.fake_mode is mode


@pytest.mark.parametrize(
    "extents", [(8192, 50257), (50257, 8192), (1, 30522), (3, 5), (0, 7), (7, 0)]
)
def test_pieces_cover_the_result_once_and_fit_the_scratch(extents: tuple[int, int]) -> None:
    rows, columns = extents
    pieces = list(aligned_mm._pieces(rows, columns, 2))
    sizes = [(r.stop - r.start) * (c.stop - c.start) for r, c in pieces]
    assert sum(sizes) == rows * columns
    assert all(size * 2 <= aligned_mm.SCRATCH_BYTES for size in sizes)
    starts = {start for r, c in pieces for start in (r.start, c.start)}
    assert all(start % aligned_mm.TILE == 0 for start in starts)
    if len(pieces) > 1:  # cut along the longer extent
        cut = {(r.start, c.start) for r, c in pieces}
        assert len({r for r, _ in cut}) == (len(pieces) if rows > columns else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("with_bias", [False, True])
def test_gpu_the_result_is_never_twice_in_memory(with_bias: bool) -> None:
    m, k, n = 4096, 256, 50257
    a = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    b = torch.randn(n, k, dtype=torch.bfloat16, device="cuda").t()
    bias = torch.randn(n, dtype=torch.bfloat16, device="cuda") if with_bias else None
    eager = a @ b if bias is None else torch.addmm(bias, a, b)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = torch.ops.iocompiler.aligned_mm(a, b, bias, n)
    torch.cuda.synchronize()
    grown = torch.cuda.max_memory_allocated() - before
    assert grown <= out.numel() * 2 + 2 * aligned_mm.SCRATCH_BYTES
    assert out.is_contiguous()
    torch.testing.assert_close(out, eager, rtol=2e-2, atol=2e-1)


@pytest.mark.gpu
def test_gpu_what_the_tail_adds_is_not_lost() -> None:
    """Each element is nearly one of b's, which is exact; the rest is less than its rounding."""
    a = torch.zeros(2048, 74, dtype=torch.bfloat16, device="cuda")
    a[torch.arange(2048, device="cuda"), torch.randint(0, 64, (2048,), device="cuda")] = -1
    a[:, 64:] = torch.rand(10, device="cuda").bfloat16() / 256
    b = torch.randn(74, 32, dtype=torch.bfloat16, device="cuda")
    b[64:].abs_()
    exact = (a.double() @ b.double()).sum(0)
    mine, eager = (
        x.double().sum(0) for x in (torch.ops.iocompiler.aligned_mm(a, b, None, 32), a @ b)
    )
    assert (mine - exact).norm() <= 2 * (eager - exact).norm() + 1e-5 * exact.norm()
