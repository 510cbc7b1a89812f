"""The semantic op: what it computes, what it promises about strides, and that it saves no matrix of
scores.
"""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from iocompiler.ops import attention_blockwise as blockwise
from iocompiler.ops import attention_kernels as kernels
from iocompiler.ops import library
from iocompiler.ops.attention import BACKWARD, FORWARD, arranged, attention
from iocompiler.ops.attention_choice import KERNELS, MEMORY, choose
from tests.ops.attention_reference import accuracy, inputs, reference

CASES = list(product((1, 7, 150), (7, 130), (1, 2, 4), (None, (1, 1), (2, 4)), (False, True)))


@pytest.mark.parametrize("kernel", ["", "blockwise"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_float64(kernel: str, dtype: torch.dtype) -> None:
    for rows, columns, groups, bias, causal in CASES:
        given = inputs(rows, columns, groups, bias)
        problems = accuracy(given, dtype, scale=0.3, causal=causal, kernel=kernel)
        assert not problems, (rows, columns, groups, bias, causal, problems)


def test_value_width_of_its_own() -> None:
    q, k, _, _ = inputs(7, 9, 2, None)
    v = torch.randn(2, 2, 9, 5, dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, v), reference(q, k, v, None, 8**-0.5, False))


@pytest.mark.parametrize("layout", ["ssss", "hhhh", "shst", "ttht"])
@pytest.mark.parametrize(("kernel", "dropout_p"), [("cpu", 0.0), ("blockwise", 0.2)])
def test_promised_strides_are_kept(kernel: str, dropout_p: float, layout: str) -> None:
    q, k, v, bias = (x.float() for x in inputs(7, 9, 2, (1, 4)))  # type: ignore[union-attr]
    arguments = (q, k, v, bias, 0.3, False, dropout_p, kernel, layout)
    real = FORWARD(*arguments)
    grads = BACKWARD(real[0], q, k, v, bias, *real, *arguments[4:], True)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v, bias)]
        fake = FORWARD(*fakes, *arguments[4:])
        fake_grads = BACKWARD(fake[0], *fakes, *fake, *arguments[4:], True)
    for there, promised in zip((*real, *grads), (*fake, *fake_grads), strict=True):
        assert (there.shape, there.stride(), there.dtype) == (
            promised.shape,
            promised.stride(),
            promised.dtype,
        )


FIRST = library.function("attention_forward", first=True)


@pytest.mark.parametrize("layout", ["ssss", "hhhh", "shst", "ttht"])
@pytest.mark.parametrize(("rows", "columns"), [(7, 9), (1, 9), (0, 9), (7, 0)])
def test_the_first_result_alone(layout: str, rows: int, columns: int) -> None:
    q, k, v, _ = (x if x is None else x.float() for x in inputs(rows, columns, 2, None))
    arguments = (q, k, v, None, 0.3, False, 0.0, "cpu", layout)
    expected = FORWARD(*arguments)[0]
    found = FIRST(*arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found.stride() == expected.stride()


def test_cudnn_is_asked_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it lays out otherwise is laid out as promised."""
    asked: list[bool] = []

    def forward(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool, *_: Any, **__: Any
    ):  # type: ignore[no-untyped-def]
        asked.append(lse)
        return (q.contiguous(),)

    stub = SimpleNamespace(_scaled_dot_product_cudnn_attention=forward)
    monkeypatch.setattr(kernels, "aten", stub)
    q = torch.randn(2, 7, 4, 8).transpose(1, 2)
    for layout, stride in (("ssss", q.stride()), ("hhhh", q.contiguous().stride())):
        found = FIRST(q, q, q, None, 0.3, False, 0.0, "cudnn", layout)
        assert torch.equal(found, q)
        assert found.stride() == stride
    assert asked == [False, False]


@pytest.mark.parametrize("shape", [(2, 4, 7, 8), (1, 4, 1, 8), (2, 1, 7, 1), (2, 0, 7, 8)])
def test_what_lies_as_promised_is_not_copied(shape: tuple[int, ...]) -> None:
    for order, dims in MEMORY.items():
        inverse = [dims.index(d) for d in range(4)]
        x = torch.randn([shape[d] for d in dims]).permute(inverse)
        assert arranged(x, shape, order).data_ptr() == x.data_ptr()
        for other, theirs in MEMORY.items():
            found = arranged(x, shape, other)
            assert torch.equal(found, x)
            assert found.permute(theirs).is_contiguous()


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_promised_has_the_layout_asked_for(kernel: str) -> None:
    """Also of the kernels that cannot run here."""
    with FakeTensorMode():
        q = torch.empty(2, 33, 4, 64, dtype=torch.bfloat16).transpose(1, 2)
        out, lse, seed, offset = FORWARD(q, q, q, None, 0.125, True, 0.1, kernel, "ssss")
        dq, dk, dv, _ = BACKWARD(
            out, q, q, q, None, out, lse, seed, offset, 0.125, True, 0.1, kernel, "ssss", False
        )
    assert out.transpose(1, 2).is_contiguous()
    assert all(x.transpose(1, 2).is_contiguous() for x in (dq, dk, dv))
    assert lse.shape == (2, 4, 64 if kernel == "efficient" else 33)


def test_memory_with_the_batch_inside_is_kept() -> None:
    """As `nn.MultiheadAttention` splits its packed projection."""
    with FakeTensorMode():
        q = torch.empty(33, 2, 4, 64, dtype=torch.bfloat16, device="cuda").permute(1, 2, 0, 3)
        choice = choose(q, q, q, None, causal=False, dropout_p=0.0)
        out = FORWARD(q, q, q, None, 0.125, False, 0.0, choice.kernel, choice.layout)[0]
    assert choice.layout == "tttt"
    assert out.stride() == q.stride()


def test_cudnn_gets_its_output_back_as_it_lays_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *_: Any, **__: Any):  # type: ignore[no-untyped-def]
        seen.extend((out, grad))
        return grad, k, v

    stub = SimpleNamespace(_scaled_dot_product_cudnn_attention_backward=backward)
    monkeypatch.setattr(kernels, "aten", stub)
    packed = torch.randn(2, 5, 3, 4, 8).select(2, 0).transpose(1, 2)
    out = torch.randn(2, 4, 5, 8)
    saved = (out, torch.zeros(2, 4, 5), torch.empty(0), torch.empty(0))
    setting = kernels.Setting(1.0, False, 0.0)
    kernels.cudnn_backward(out, packed, packed, packed, None, saved, setting, False)
    for found in seen:  # the output and its gradient
        assert found.stride() == torch.empty_like(packed).stride() != out.stride()
        assert torch.equal(found, out)


def test_blocks_skipped_by_the_causal_kernel_are_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any):  # type: ignore[no-untyped-def]
        above = torch.ones(5, 5, dtype=torch.bool).triu(1)
        return grad, k, v, torch.ones(2, 4, 5, 5).masked_fill(above, float("nan"))

    stub = SimpleNamespace(_scaled_dot_product_efficient_attention_backward=backward)
    monkeypatch.setattr(kernels, "aten", stub)
    q, bias = torch.randn(2, 4, 5, 8), torch.randn(1, 4, 5, 5)
    saved = (q, torch.zeros(2, 4, 32), torch.empty(0), torch.empty(0))
    setting = kernels.Setting(1.0, True, 0.0)
    *_, found = kernels.efficient_backward(q, q, q, q, bias, saved, setting, True)
    assert torch.equal(found, 2 * torch.ones(1, 4, 5, 5).tril())


def test_the_operator_is_well_formed() -> None:
    q = torch.randn(2, 7, 4, 8).transpose(1, 2).requires_grad_()
    bias = torch.randn(1, 4, 1, 7, requires_grad=True)
    torch.library.opcheck(FORWARD, (q, q, q, bias, 0.3, True, 0.0, "cpu", "ssss"))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (q, q, q, bias, 0.3, False, 0.5, "blockwise", "ssss")
    torch.library.opcheck(FORWARD, arguments, test_utils=tests)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 0), (0, 0)])
def test_empty(rows: int, columns: int) -> None:
    q = torch.randn(2, 4, rows, 8, requires_grad=True)
    k, v = (torch.randn(2, 4, columns, 8, requires_grad=True) for _ in range(2))
    out = attention(q, k, v)
    assert torch.equal(out, torch.zeros(2, 4, rows, 8))
    for grad, of in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert torch.equal(grad, torch.zeros_like(of))


def test_nan_and_inf_go_through() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    q[0, 0, 1, 0] = float("nan")
    v[0, 1, 4, 2] = float("inf")
    for kernel in ("", "blockwise"):
        out = attention(q, k, v, kernel=kernel)
        assert out[0, 0, 1].isnan().all()
        assert out[0, 0, 2].isfinite().all()
        assert out[0, 1, :, 2].isposinf().all()


def test_dropout_scales_what_it_keeps_and_is_replayed() -> None:
    q, k = torch.randn(2, 4, 300, 8), torch.randn(2, 4, 300, 8)
    v = torch.ones(2, 4, 300, 8, requires_grad=True)
    torch.manual_seed(3)
    out = attention(q, k, v, dropout_p=0.3)
    assert abs(out.mean().item() - 1.0) < 0.02
    assert out.std() > 0.01
    torch.manual_seed(3)
    assert torch.equal(attention(q, k, v, dropout_p=0.3), out)
    assert not torch.equal(attention(q, k, v, dropout_p=0.3), out)
    # linear in v: the gradient times v is the output, only if the backward drops what the forward
    # dropped
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((grad * v).sum(), out.sum())


def test_dropout_gradients_are_those_of_the_dropped_function() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(7)
        return attention(q, k, v, dropout_p=0.4)

    assert torch.autograd.gradcheck(dropped, (q, k, v))


def test_memory_is_linear_in_the_length() -> None:
    """No tensor of rows x columns is ever made by the blockwise kernel."""
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, Tensor) else 0)
            return out

    q = torch.randn(1, 1, 1024, 8)
    with Watch():
        out, lse = blockwise.forward(q, q, q, None, q, scale=1.0, causal=True, dropout_p=0.0)
        blockwise.backward(
            out, q, q, q, None, out, lse, q, scale=1.0, causal=True, dropout_p=0.0, bias_grad=False
        )
    assert max(sizes) <= blockwise.ROWS * 1024


@pytest.mark.parametrize(
    ("dtype", "shape", "causal", "bias", "dropout_p", "kernel"),
    [
        (torch.bfloat16, (2, 4, 128, 64), True, False, 0.0, "cudnn"),
        (torch.float16, (2, 4, 130, 128), False, False, 0.0, "cudnn"),
        (torch.bfloat16, (2, 4, 130, 64), False, False, 0.1, "flash"),
        (torch.bfloat16, (2, 4, 128, 256), False, False, 0.0, "flash"),
        (torch.bfloat16, (2, 4, 128, 33), True, False, 0.0, "flash"),
        (torch.bfloat16, (2, 4, 128, 64), True, True, 0.0, "efficient"),
        (torch.float32, (2, 4, 128, 64), True, False, 0.1, "efficient"),
        (torch.float64, (2, 4, 128, 64), True, False, 0.0, "blockwise"),
        (torch.bfloat16, (2, 4, 1, 64), False, False, 0.0, "flash"),
    ],
)
def test_choice_on_a_gpu(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    causal: bool,
    bias: bool,
    dropout_p: float,
    kernel: str,
) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the choice of an older device")
    with FakeTensorMode():
        q = torch.empty(shape, dtype=dtype, device="cuda")
        extra = torch.empty(1, 1, shape[2], shape[2], dtype=dtype, device="cuda") if bias else None
        choice = choose(q, q, q, extra, causal=causal, dropout_p=dropout_p)
    assert choice.kernel == kernel
    by_rows = kernel in ("efficient", "blockwise") or shape[2] == 1
    assert choice.layout == ("ssss" if by_rows else "hhhh")


@pytest.mark.parametrize(
    ("width", "dtype", "kernel"),
    [
        (64, torch.bfloat16, "efficient"),
        (33, torch.bfloat16, "blockwise"),
        (100, torch.float16, "blockwise"),
        (100, torch.float32, "efficient"),
        (33, torch.float32, "blockwise"),
    ],
)
def test_the_efficient_kernel_gets_whole_vectors_only(
    width: int, dtype: torch.dtype, kernel: str
) -> None:
    with FakeTensorMode():
        q = torch.empty(2, 3, 16, width, dtype=dtype, device="cuda")
        bias = torch.empty(2, 3, 16, 16, dtype=dtype, device="cuda")
        assert choose(q, q, q, bias, causal=False, dropout_p=0.0).kernel == kernel
