"""Shapes, strides and masks at the edges: what is taken must be right there too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.attention_cases import Compiled, heads


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).requires_grad_()


def check(function: Callable[..., Any], *inputs: Tensor, dynamic: bool | None = None) -> list[str]:
    """Output (with its strides) and gradients equal eager's; returns the variants taken."""
    compiled = Compiled(function, dynamic=dynamic)
    out, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
    assert out.stride() == expected.stride()
    wanted = [x for x in inputs if x.requires_grad]
    ours, theirs = (torch.autograd.grad(x.sin().sum(), wanted) for x in (out, expected))
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-3)
    return compiled.variants


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(
    ("q", "k", "v", "variant"),
    [
        ((1, 4, 7, 8), (1, 4, 9, 8), (1, 4, 9, 8), "full"),
        ((1, 1, 7, 8), (1, 1, 9, 8), (1, 1, 9, 8), "full"),
        ((2, 4, 1, 8), (2, 4, 9, 8), (2, 4, 9, 8), "full"),
        ((2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 1), "full"),
        ((4, 4, 4, 4), (4, 4, 4, 4), (4, 4, 4, 4), "full"),
        ((7, 8), (2, 4, 9, 8), (2, 4, 9, 8), "full"),
        ((1, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 8), "full"),
        ((2, 4, 7, 8), (1, 4, 9, 8), (1, 4, 9, 8), "full"),
        ((2, 4, 7, 8), (1, 4, 9, 8), (2, 4, 9, 8), "full"),
        ((2, 4, 7, 8), (2, 1, 9, 8), (2, 1, 9, 8), "gqa"),
        ((2, 3, 4, 7, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 8), "full"),
    ],
)
def test_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], variant: str) -> None:
    assert check(plain, draw(*q), draw(*k), draw(*v)) == [variant]


@pytest.mark.parametrize(("q", "k"), [((2, 4, 7, 8), (2, 4, 1, 8)), ((2, 4, 7, 1), (2, 4, 9, 1))])
def test_one_key_or_a_width_of_one_is_left_alone(q: tuple[int, ...], k: tuple[int, ...]) -> None:
    assert check(plain, draw(*q), draw(*k), draw(*k)) == []


def test_equal_sizes_are_not_mistaken_for_each_other() -> None:
    x = [draw(4, 4, 4, 4) for _ in range(3)]
    assert check(lambda q, k, v: (q @ k.mT).softmax(1) @ v, *x) == []
    assert check(lambda q, k, v: (q @ k.mT).softmax(2) @ v, *x) == []
    assert check(lambda q, k, v: (q @ k.mT).softmax(2).mT @ v, *x) == ["full"]
    assert check(lambda q, k, v: (q @ k.mT).softmax(-1) @ v.mT, *x) == ["full"]
    assert check(lambda q, k, v: (q @ k.mT).softmax(-1).transpose(0, 1) @ v, *x) == ["full"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "after", [lambda o: o, torch.sin, lambda o: o.transpose(1, 2), torch.clone]
)
def test_the_strides_of_the_result_are_eager_s(after: Callable[..., Any], dynamic: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return after(plain(*(x.transpose(1, 2) for x in (q, k, v))))

    assert check(function, *(draw(3, 7, 4, 8) for _ in range(3)), dynamic=dynamic) == ["full"]


@pytest.mark.parametrize(
    "bias", [(7, 9), (9,), (7, 1), (4, 1, 1), (2, 1, 1, 9), (1, 4, 7, 9), (2, 4, 7, 9)]
)
@pytest.mark.parametrize("join", [torch.add, torch.sub, lambda s, b: b - s])
def test_biases_of_every_shape(bias: tuple[int, ...], join: Callable[..., Any]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return join(q @ k.mT, b).softmax(-1) @ v

    x = draw(2, 4, 7, 8), draw(2, 4, 9, 8), draw(2, 4, 9, 8), draw(*bias)
    assert check(function, *x) == ["bias"]


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 1, 1, 1), (7, 1), (2, 4, 7, 1)])
def test_a_temperature_that_does_not_depend_on_the_key(shape: tuple[int, ...]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        s = q @ k.mT
        return (s * t / 2.0).softmax(-1) @ v

    x = draw(2, 4, 7, 8), draw(2, 4, 9, 8), draw(2, 4, 9, 8), draw(*shape)
    assert check(function, *x) == ["full"]


def _positions(q: Tensor, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    i = torch.arange(q.shape[-2], dtype=dtype)
    return i[:, None], i[None, :]


def _built_in_place(q: Tensor) -> Tensor:
    n = q.shape[-2]
    return torch.zeros(n, n, dtype=torch.bool).masked_fill_(
        torch.ones(n, n, dtype=torch.bool).triu_(1), True
    )


def _documents(q: Tensor) -> Tensor:
    i, j = _positions(q)
    return (i // 3 != j // 3) | (j > i)


@pytest.mark.parametrize(
    ("hidden", "variant"),
    [
        (lambda q: _positions(q)[1] > _positions(q)[0], "causal"),
        (lambda q: _positions(q)[0] < _positions(q)[1], "causal"),
        (lambda q: ~(_positions(q)[0] - _positions(q)[1] >= 0), "causal"),
        (lambda q: _positions(q)[1] - 1 >= _positions(q)[0], "causal"),
        (_built_in_place, "causal"),
        (_documents, "causal+mask"),
        (lambda q: (_positions(q)[1] - _positions(q)[0]).abs() > 2, "mask"),
        (lambda q: (_positions(q)[1] > _positions(q)[0]) & (_positions(q)[1] >= 3), "mask"),
        (lambda q: _positions(q)[1] > _positions(q)[0] + 1, "mask"),
        (lambda q: _positions(q)[1] < _positions(q)[0], "mask"),
        # positions that are rounded or wrap around are no positions
        (lambda q: _positions(q, torch.bfloat16)[1] > _positions(q, torch.bfloat16)[0], "mask"),
        (lambda q: (_positions(q, torch.uint8)[1] - _positions(q, torch.uint8)[0]) > 2, "mask"),
    ],
)
def test_masks_of_positions(hidden: Callable[[Tensor], Tensor], variant: str) -> None:
    def function(q: Tensor) -> Tensor:
        return (q @ q.mT).masked_fill(hidden(q), float("-inf")).softmax(-1) @ q

    x = (draw(1, 2, 300, 4) * 0.3).detach().requires_grad_()
    if hidden(x).all(-1).any():
        pytest.fail("a case with a row of no keys says nothing")
    assert check(function, x) == [variant]


def test_a_scale_that_grows_with_the_length() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / k.shape[2]).softmax(-1) @ v

    assert check(function, *(draw(3, 4, 7, 8) for _ in range(3)), dynamic=True) == ["full"]


@pytest.mark.parametrize("library", [False, True])
def test_numbers_that_dynamo_made_symbolic(library: bool) -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.scale = 0.25, 0.3

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if library:
                return F.scaled_dot_product_attention(q, k, v, None, self.p, scale=self.scale)
            return F.dropout((q @ k.mT * self.scale).softmax(-1), self.p) @ v

    compiled = Compiled(Module(), dynamic=True)
    compiled(*(draw(3, 4, 7, 8) for _ in range(3))).sum().backward()
    assert compiled.variants == ["dropout"]
    assert compiled.calls[0].args[4:7] == (0.3, False, 0.25)


def test_a_cache_of_keys() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor) -> Tensor:
        k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        return F.scaled_dot_product_attention(q, k, v)

    one, many = (2, 4, 1, 8), (2, 4, 9, 8)
    assert check(function, *(draw(*s) for s in (one, one, one, many, many))) == ["full"]


def _filled(q, k, v):
    held = k.new_empty(k.shape)
    held[..., :4].copy_(k[..., :4])
    held[..., 4:].copy_(k[..., 4:] * 2)
    return (q @ held.mT).softmax(-1) @ v


def _filled_and_transposed(q, k, v):
    held = k.new_zeros(2, 7, 4, 8)
    held[:, :3] = k.transpose(1, 2)[:, :3]
    return (q @ held.transpose(1, 2).mT).softmax(-1) @ v


def _cached(q, k, v):
    k[:, :, 3:4], v[:, :, 3:4] = q[:, :, :1], q[:, :, 1:2]
    return F.scaled_dot_product_attention(q, k, v)


def _filled_too_late(q, k, v):
    held = k * 1.0
    copied = held.repeat(1, 1, 1, 1)
    held[..., :4].mul_(5)
    return (q @ copied.mT).softmax(-1) @ v + held.sum()


def _filled_behind_a_copy(q, k, v):
    held = k * 1.0
    copied = held.transpose(1, 2).contiguous()
    held[..., :4].mul_(5)
    return (q @ copied.transpose(1, 2).mT).softmax(-1) @ v + held.sum()


def _filled_behind_repeated_heads(q, k, v):
    held = k[:, :2] * 1.0
    copied = held.repeat_interleave(2, 1)
    held[:, 0].mul_(5)
    return (q @ copied.mT).softmax(-1) @ v + held.sum()


def _filled_between(q, k, v):
    held = v * 1.0
    p = (q @ k.mT).softmax(-1)
    held[:, :, 0].mul_(3)
    return p @ held


@pytest.mark.parametrize(
    ("function", "variants"),
    [
        *((f, ["full"]) for f in (_filled, _filled_and_transposed, _cached)),
        *((f, []) for f in (_filled_too_late, _filled_behind_a_copy)),
        *((f, []) for f in (_filled_behind_repeated_heads, _filled_between)),
    ],
)
def test_memory_that_is_filled_in_place(function: Callable[..., Any], variants: list[str]) -> None:
    """Before anything reads it, it may be; after a copy was made of it, the attention would read
    what the copy does not have.
    """
    ours, theirs = ({n: x.detach().clone() for n, x in heads().items()} for _ in range(2))
    compiled = Compiled(function)
    torch.testing.assert_close(compiled(**ours), function(**theirs))
    torch.testing.assert_close(ours, theirs)
    assert compiled.variants == variants


@pytest.mark.parametrize("library", [False, True])
def test_autocast(library: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v) if library else plain(q, k, v)

    compiled, x = Compiled(function), [draw(2, 4, 7, 8) for _ in range(3)]
    out, expected = compiled(*x), function(*x)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=3e-2, rtol=3e-2)
    assert compiled.variants == ["full"]


def test_queries_and_keys_widened_before_the_product() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.float() @ k.float().mT).softmax(-1).to(v.dtype) @ v

    x = [draw(2, 4, 7, 8).detach().bfloat16() for _ in range(3)]
    compiled = Compiled(function)
    torch.testing.assert_close(compiled(*x), function(*x), atol=3e-2, rtol=3e-2)
    assert compiled.calls[0].args[0].meta["val"].dtype == torch.bfloat16


def test_a_checkpointed_region_is_left_alone() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(plain, q, k, v, use_reentrant=False)

    assert check(function, *(draw(2, 4, 7, 8) for _ in range(3))) == []


def test_through_the_whole_compiler() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        s = (q @ k.mT).masked_fill(_positions(q)[1] > _positions(q)[0], float("-inf"))
        return (s.softmax(-1) @ v).transpose(1, 2).flatten(2)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="iocompiler", dynamic=True)
    for length in (7, 40):
        x = [draw(3, length, 4, 8) for _ in range(3)]
        out, expected = compiled(*x), function(*x)
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
        ours, theirs = (torch.autograd.grad(y.sin().sum(), x) for y in (out, expected))
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("late", ["queries", "keys", "values", "all"])
def test_windows_of_an_image(late: str) -> None:
    """Rows and keys that lie in two dims of what they are copied from are one dim of the copy."""

    def apart(x, name):
        if late not in (name, "all"):
            return x.reshape(8, 16, 2, 8).transpose(1, 2)
        x = x.view(2, 2, 4, 2, 4, 16).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(8, 16, 2, 8).transpose(1, 2)

    def function(q, k, v):
        q, k, v = (apart(x, n) for x, n in ((q, "queries"), (k, "keys"), (v, "values")))
        return (q @ k.mT).softmax(-1) @ v

    inputs = [torch.randn(2, 8, 8, 16) for _ in range(3)]
    compiled = Compiled(function)
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    assert compiled.variants == ["full"]
    (call,) = compiled.calls
    assert [x.meta["val"].shape for x in call.args[:3]] == 3 * [(8, 2, 16, 8)]
