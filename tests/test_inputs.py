"""Inputs and outputs of every kind: dtypes, empty and strided tensors, aliases, constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.backend import Compiler

Draw = Callable[[], tuple[Any, ...]]


def rand(*shape: int, **options: Any) -> Tensor:
    return torch.randn(shape, **options)


def leaf(*shape: int) -> Tensor:
    return rand(*shape).requires_grad_()


def leaf_of(*shape: int) -> Tensor:
    """A complex one."""
    return rand(*shape, dtype=torch.complex64).requires_grad_()


def whole(dtype: torch.dtype, low: int = -128, high: int = 127) -> Tensor:
    return torch.randint(low, high, (5, 6), dtype=dtype)


def _integers(m: Tensor) -> tuple[Tensor, ...]:
    return m + 100, m * 3, m // 7, m % 7, m / 3, m - 1, -m, m.sum(), m.amax(1), m == 4, m.argmin(0)


def _twice(x: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    return y, y.t(), y[1:], y, x + 1


def _views(x: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    return y[1:], y.t(), x.view(-1), x


def _rotated(x: Tensor, by: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.view(-1, 3, 2)) * by).flatten(1)


def _specials(x: Tensor) -> tuple[Tensor, ...]:
    clamped = x.clamp(-1, 1), x.relu(), x.nan_to_num()
    return *clamped, x.isnan(), x.amax(), x.softmax(0), x.sign(), x.round()


def _masks(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return a & b, a | b, a ^ b, ~a, a == b, a.sum(), a.any(0), a.all(), a.cumsum(0), a + b, a * b


def _written(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    x.add_(y)
    x[0].mul_(3)
    return y.mul_(x), x.sum()


STRANGE = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), -0.0, 2.5])

CASES: dict[str, tuple[Callable[..., Any], Draw]] = {
    "bool masks": (_masks, lambda: (rand(4, 5) > 0, rand(4, 5) > 0)),
    "a mask that broadcasts": (lambda x, m: torch.where(m, x, x * 2).masked_fill(m, -1.0).sum(1),
                               lambda: (leaf(4, 5), rand(4, 1) > 0)),
    "uint8": (_integers, lambda: (whole(torch.uint8, 0, 255),)),
    "int8": (_integers, lambda: (whole(torch.int8),)),
    "int16": (_integers, lambda: (whole(torch.int16, -(2**15), 2**15),)),
    "int32": (_integers, lambda: (whole(torch.int32, -(2**20), 2**20),)),
    "int64": (_integers, lambda: (whole(torch.int64, -(2**40), 2**40),)),
    "integers mixed": (lambda a, b, c: (a + b, b * c, a / b, a**2, torch.maximum(a, b)),
                       lambda: (whole(torch.int64, 1, 9), whole(torch.int8, 1, 9), rand(5, 6))),
    "float64": (lambda x: (x.sin(), x.softmax(-1), x.var()),
                lambda: (rand(4, 5, dtype=torch.float64).requires_grad_(),)),
    "float16": (lambda x: (x * 2, x.sum(), x.relu()), lambda: (rand(4, 5).half(),)),
    "a scalar in a tensor": (lambda x, s: x * s + s, lambda: (leaf(4, 3), leaf())),
    "a wider scalar": (lambda x, s: x * s + s, lambda: (leaf(4, 3), rand(dtype=torch.float64))),
    "an integer scalar": (lambda x, s: x * s + s, lambda: (leaf(4, 3), torch.tensor(3))),
    "rank 0": (lambda x: (x.sum(), x.softmax(0), x.max(), x.view(1, 1)), lambda: (leaf(),)),
    "rank 7": (lambda x: (x.permute(6, 5, 4, 3, 2, 1, 0).contiguous().sum((0, 3)), x.softmax(3)),
               lambda: (leaf(2, 1, 3, 2, 1, 2, 2),)),
    "numbers": (lambda x, n, f: x * n + f, lambda: (leaf(3), 3, 2.5)),
    "empty": (lambda x: (x * 2, x.sum(0), x.mean(), x.view(0), torch.cat([x, x]), x.softmax(-1)),
              lambda: (rand(0, 3),)),
    "empty, with gradients": (lambda x, w: ((x @ w).relu(), torch.cat([x, w.t()]) * 2),
                              lambda: (leaf(0, 3), leaf(3, 4))),
    "nothing to contract": (lambda x, w: x @ w + 1, lambda: (leaf(2, 0), leaf(0, 4))),
    "transposed": (lambda x: (x * 2, x.exp().sum(0)), lambda: (rand(4, 5).t().requires_grad_(),)),
    "expanded": (lambda x: (x * 2, x.sum(0)), lambda: (rand(1, 5).expand(4, 5),)),
    "sliced with steps": (lambda x: (x * 2, x.softmax(-1)), lambda: (rand(8, 10)[1::2, ::3],)),
    "overlapping": (lambda x: x * 2 + x.sum(), lambda: (rand(20).as_strided((4, 5), (2, 1)),)),
    "channels last": (lambda x: (x * 2, x.mean((2, 3)), F.pad(x, (1, 1))),
                      lambda: (rand(2, 3, 4, 5).to(memory_format=torch.channels_last),)),
    "an input as an output": (lambda x: (x, x * 2), lambda: (leaf(3),)),
    "views of an input": (lambda x: (x.view(-1), x.t(), x[1:], x * 1), lambda: (leaf(3, 4),)),
    "one result several times": (_twice, lambda: (leaf(3, 4),)),
    "None": (lambda x: (None, x * 2, None), lambda: (leaf(3),)),
    "no computation": (lambda x, y: (y, x), lambda: (rand(3), leaf(3))),
    "constants": (lambda x: (torch.ones(3), torch.tensor([1.0, 2.0]), torch.arange(4), x * 2),
                  lambda: (leaf(3),)),
    "constants alone": (lambda x: (torch.full((2,), 7), torch.zeros(0, 3)), lambda: (rand(3),)),
    "Python numbers": (lambda x: (x * 2, 3, 2.5, x.shape[0]), lambda: (leaf(3),)),
    "integer results": (lambda x: (x.argmax(1), x.topk(2)[1], x.sort()[1], x.int(), x.max(1)[0]),
                        lambda: (leaf(4, 5),)),
    "detached": (lambda x: (x.detach() * 2, x * 2), lambda: (leaf(4),)),
    "unused": (lambda x, y: x * 2, lambda: (leaf(4), leaf(5))),
    "overwritten": (_written, lambda: (rand(4, 3), rand(4, 3))),
    "overwritten by index": (lambda x, i, v: x.index_put_((i,), v, accumulate=True) * 2,
                             lambda: (rand(4, 3), torch.tensor([0, 2, 0]), rand(3, 3))),
    "NaN and infinity": (_specials, lambda: (STRANGE.clone(),)),
    "complex": (lambda x: (x * 2, x.abs(), x.real + 1), lambda: (rand(4, dtype=torch.complex64),)),
    "complex, with gradients": (lambda x, y: (x * y, (x @ y.mH).abs(), torch.view_as_real(x / y)),
                                lambda: (leaf_of(3, 4), leaf_of(3, 4))),
    "complex beside real": (lambda x, y: (x * y, x.real * y, y.to(torch.complex64).sum(0)),
                            lambda: (leaf_of(3, 4), leaf(3, 4))),
    "rotations by complex numbers": (_rotated, lambda: (leaf(4, 6), leaf_of(3))),
    "transformed by Fourier": (lambda x: (torch.fft.rfft(x).abs(), torch.fft.fft(x).real * 2),
                               lambda: (leaf(4, 6),)),
    "complex, overwritten": (lambda x, y: x.mul_(y) + 1,
                             lambda: (rand(4, dtype=torch.complex64), rand(4))),
    "float8": (lambda x: (x.float() * 2, x.to(torch.bfloat16), x.t(), x[1:], x.view(torch.uint8)),
               lambda: (rand(4, 5).to(torch.float8_e4m3fn),)),
    "float8, made": (lambda x: ((x * 2).to(torch.float8_e4m3fn), x.sum(0).to(torch.float8_e5m2)),
                     lambda: (rand(4, 5),)),
    "the bits of floats": (lambda x: (x.view(torch.int32) + 1, x.view(torch.int16).sum(-1)),
                           lambda: (rand(4, 6),)),
    "views of a result": (_views, lambda: (leaf(3, 4),)),
    "overwritten behind a view": (lambda x: (x[1:].mul_(2), x.t(), x + 1), lambda: (rand(4, 3),)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_is_what_eager_gives(name: str) -> None:
    _check(name, Compiler(engine="reference", strict=True), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str) -> None:
    _check(name, Compiler(strict=True), "cuda")


def _check(name: str, backend: Compiler, device: str) -> None:
    function, draw = CASES[name]
    run = torch.compile(function, backend=backend, dynamic=False)
    for seed in (0, 1):
        torch.manual_seed(seed)
        ours = _moved(draw(), device)
        torch.manual_seed(seed)
        theirs = _moved(draw(), device)
        results, expected = _listed(run(*ours)), _listed(function(*theirs))
        assert len(results) == len(expected)
        for one, other in zip(results, expected, strict=True):
            _same(one, other)
        assert _shared(results, ours) == _shared(expected, theirs)
        _differentiate(results)
        _differentiate(expected)
        for one, other in zip(ours, theirs, strict=True):
            _same(one, other)
            if isinstance(one, Tensor):
                _same(one.grad, other.grad)


def _moved(inputs: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """Tensors on the device, strides as they are; a scalar beside them stays on the CPU."""
    if device == "cpu":
        return inputs
    alone = not any(isinstance(x, Tensor) and x.dim() for x in inputs)
    return tuple(
        _copied(x, device) if isinstance(x, Tensor) and (alone or x.dim()) else x for x in inputs
    )


def _copied(x: Tensor, device: str) -> Tensor:
    flat = x.detach().as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0).to(device)
    moved = flat.as_strided(x.shape, x.stride(), x.storage_offset())
    return moved.requires_grad_(x.requires_grad)


def _listed(output: Any) -> list[Any]:
    return list(output) if isinstance(output, tuple) else [output]


def _same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if not isinstance(one, Tensor):
        assert one == other
        return
    assert (one.dtype, one.requires_grad) == (other.dtype, other.requires_grad)
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    assert all(size <= 1 or a == b for size, a, b in strides)
    torch.testing.assert_close(one, other, equal_nan=True)


def _shared(results: list[Any], inputs: tuple[Any, ...]) -> list[tuple[int, int]]:
    """Pairs of places with one storage."""
    tensors = [x for x in (*results, *inputs) if isinstance(x, Tensor) and x.numel()]
    places = [x.untyped_storage().data_ptr() for x in tensors]
    return [(i, j) for i in range(len(places)) for j in range(i) if places[i] == places[j]]


def _differentiate(results: list[Any]) -> None:
    wanted = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
    if wanted:
        torch.autograd.backward(wanted, [torch.ones_like(x) for x in wanted])
