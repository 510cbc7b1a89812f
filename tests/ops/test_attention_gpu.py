"""Every kernel behind the op on a GPU: strides, groups, biases, lengths, dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from iocompiler.ops import library
from iocompiler.ops.attention import BACKWARD, FORWARD, attention
from tests.ops.attention_reference import accuracy, inputs, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALF = [torch.bfloat16, torch.float16]


def _check(kernel: str, dtype: torch.dtype, rows: int, columns: int, **options: object) -> None:
    causal = bool(options.pop("causal", False))
    heads, groups = int(options.pop("heads", 4)), int(options.pop("groups", 4))  # type: ignore[call-overload]
    given = inputs(
        rows, columns, groups, options.pop("bias", None), int(options.pop("width", 64)), heads
    )  # type: ignore[arg-type, call-overload]
    assert not options
    assert not accuracy(given, dtype, scale=0.125, causal=causal, kernel=kernel, device="cuda")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize(
    ("rows", "columns"), [(128, 128), (130, 130), (7, 7), (96, 200), (1024, 1024)]
)
def test_full(kernel: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    _check(kernel, dtype, rows, columns)


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient", "blockwise"])
@pytest.mark.parametrize("length", [64, 130, 1000])
def test_causal(kernel: str, length: int) -> None:
    _check(kernel, torch.bfloat16, length, length, causal=True)


@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (128, 64), (7, 130)])
def test_causal_with_unequal_lengths(rows: int, columns: int) -> None:
    _check("efficient", torch.bfloat16, rows, columns, causal=True)
    _check("", torch.bfloat16, rows, columns, causal=True)


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("groups", [1, 2])
def test_groups(kernel: str, groups: int) -> None:
    _check(kernel, torch.bfloat16, 128, 128, groups=groups, causal=True)
    _check(kernel, torch.bfloat16, 130, 130, groups=groups)


@pytest.mark.parametrize("width", [16, 32, 33, 80, 96, 100, 128])
@pytest.mark.parametrize("kernel", ["flash", "efficient", ""])
def test_head_widths(kernel: str, width: int) -> None:
    if kernel == "efficient" and width % 8:
        pytest.skip("never chosen: see ops/attention_choice.py")
    _check(kernel, torch.bfloat16, 130, 130, width=width, causal=True)


@pytest.mark.parametrize("kernel", ["flash", ""])
def test_wide_heads(kernel: str) -> None:
    _check(kernel, torch.bfloat16, 130, 130, width=256, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("bias", [(1, 1), (1, 4), (2, 1), (2, 4)])
@pytest.mark.parametrize("length", [128, 130])
def test_bias_and_its_gradient(dtype: torch.dtype, bias: tuple[int, int], length: int) -> None:
    _check("efficient", dtype, length, length, bias=bias)
    _check("efficient", dtype, length, length, bias=bias, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [135, 300])
def test_bias_gradient_where_causal_blocks_are_skipped(dtype: torch.dtype, length: int) -> None:
    """What the library's kernel never writes must not be read: its memory held NaN before."""
    for size in (1 << 20, 1 << 21, 1 << 22, 1 << 23):
        torch.full((size,), float("nan"), device="cuda")
    _check("efficient", dtype, length, length, bias=(1, 4), causal=True)


@pytest.mark.parametrize("ours_first", [False, True])
@pytest.mark.parametrize("memory", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)])
@pytest.mark.parametrize("length", [128, 135])
def test_cudnn_backward_beside_eagers(
    ours_first: bool, memory: tuple[int, ...], length: int
) -> None:
    """Both build the graph cuDNN keeps for these strides, and both are right on the other's."""
    shape, width = (3, 4, length + ours_first, 64), 64  # sizes of no other test
    back = [memory.index(d) for d in range(4)]
    q, k, v, grad = (
        torch.randn([shape[d] for d in memory], device="cuda").permute(back).bfloat16()
        for _ in range(4)
    )
    grad = grad.contiguous()

    def eager(*inputs: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(*inputs)

    def gradients(f: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(f(*leaves), leaves, grad.to(dtype))

    runs = {
        "eager": eager,
        "ours": lambda *x: attention(*x, kernel="cudnn"),
        "chosen": lambda *x: attention(*x),
    }
    exact = gradients(lambda *x: reference(*x, None, width**-0.5, False), torch.float64)
    for name in sorted(runs, reverse=ours_first):
        for place, one, true in zip("qkv", gradients(runs[name], q.dtype), exact, strict=True):
            error = (one.double() - true).norm() / true.norm()
            assert error < 0.01, f"{name}: gradient of {place} errs by {error.item():.3g}"


@pytest.mark.parametrize("length", [128, 130])
def test_float32(length: int) -> None:
    _check("", torch.float32, length, length, causal=True)
    _check("", torch.float32, length, length, width=33, groups=2)


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient", "blockwise"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("packed", [False, True])
def test_promised_strides_are_kept(kernel: str, dropout_p: float, packed: bool) -> None:
    qkv = torch.randn(2, 128, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x if packed else x.contiguous() for x in qkv.unbind(2))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    setting = (0.125, True, dropout_p, kernel, "ssss")
    real = FORWARD(q, k, v, None, *setting)
    grads = BACKWARD(torch.randn_like(real[0]), q, k, v, None, *real, *setting, False)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        fake = FORWARD(*fakes, None, *setting)
        fake_grads = BACKWARD(fake[0], *fakes, None, *fake, *setting, False)
    for there, promised in zip((*real, *grads), (*fake, *fake_grads), strict=True):
        assert there.shape == promised.shape
        assert there.stride() == promised.stride()
        assert there.dtype == promised.dtype


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient", "blockwise"])
@pytest.mark.parametrize(("rows", "columns", "causal"), [(128, 128, True), (7, 130, False)])
def test_the_first_result_alone(kernel: str, rows: int, columns: int, causal: bool) -> None:
    """As exact as with the log-sum-exps beside it, and laid out as promised."""
    given = [x if x is None else x.bfloat16().cuda() for x in inputs(rows, columns, 4, None, 64, 4)]
    setting = (0.125, causal, 0.0, kernel, "ssss")
    both = FORWARD(*given, *setting)[0]
    found = library.function("attention_forward", first=True)(*given, *setting)
    torch.testing.assert_close(found, both)
    assert found.stride() == both.stride()


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
def test_packed_projections_are_read_where_they_lie(kernel: str) -> None:
    qkv = torch.randn(2, 256, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    attention(q, k, v, kernel=kernel)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention(q, k, v, kernel=kernel)
    torch.cuda.synchronize()
    # the output and the log-sum-exps, and no copy of an input beside them
    assert torch.cuda.max_memory_allocated() - before < 2 * out.numel() * out.element_size()


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient", "blockwise"])
def test_dropout(kernel: str) -> None:
    q, k = (torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.ones(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()

    def run() -> Tensor:
        torch.manual_seed(3)
        return attention(q, k, v, dropout_p=0.3, kernel=kernel)

    out = run()
    assert abs(out.float().mean().item() - 1.0) < 0.02
    assert out.float().std() > 0.01
    assert torch.equal(run(), out)
    # linear in v: this holds only if the backward drops what the forward dropped
    (grad,) = torch.autograd.grad(out.float().sum(), v)
    torch.testing.assert_close(grad.float().sum(), out.float().sum(), rtol=1e-2, atol=0.0)
    weights = torch.randn(256, 1, device="cuda")
    (grad,) = torch.autograd.grad((run().float() * weights).sum(), v)
    expected = (run().float() * weights).sum()
    torch.testing.assert_close((grad.float() * v.float()).sum(), expected, rtol=3e-2, atol=20.0)


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient", "blockwise"])
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 0)])
def test_empty(kernel: str, rows: int, columns: int) -> None:
    q = torch.randn(2, 4, rows, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k = torch.randn(2, 4, columns, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = attention(q, k, k, kernel=kernel)
    assert torch.equal(out, torch.zeros_like(q))
    out.sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k))


def test_a_row_masked_by_a_finite_number_is_uniform() -> None:
    q, k, v = (torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    bias = torch.zeros(1, 1, 64, 64, device="cuda", dtype=torch.bfloat16)
    bias[:, :, 5] = -1e30
    out = attention(q, k, v, bias)
    torch.testing.assert_close(out[:, :, 5], v.float().mean(2).bfloat16(), atol=1e-2, rtol=1e-2)
