"""Attention to a cache that is written in place, and to one that is handed out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iocompiler.compilation import Compilation
from iocompiler.ops.target import planned_for
from tests.compiling import compiler
from tests.passes.attention_cases import Compiled

LENGTH, WIDTH = 32, 8


def tensors(dtype: torch.dtype = torch.float32, filled: int = 5) -> dict[str, Tensor]:
    """Two query heads a key head; ``length`` positions of the caches are filled."""
    torch.manual_seed(0)
    shapes = {"q": (4, 1), "k": (2, 1), "v": (2, 1), "keys": (2, LENGTH), "values": (2, LENGTH)}
    found = {n: torch.randn(3, h, s, WIDTH).to(dtype) for n, (h, s) in shapes.items()}
    return {**found, "length": torch.tensor([filled])}


def keep(length: Tensor) -> Tensor:
    return (torch.arange(LENGTH) <= length)[None, None, None].expand(3, 1, 1, LENGTH)


def repeated(x: Tensor) -> Tensor:
    return x[:, :, None].expand(3, 2, 2, LENGTH, WIDTH).reshape(3, 4, LENGTH, WIDTH)


def static(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Tensor:
    """A decode step as Hugging Face's StaticCache has it."""
    mask, at = keep(length), torch.arange(1) + length
    length.add_(1)
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    return F.scaled_dot_product_attention(q, repeated(keys), repeated(values), mask)


def returned_by_the_write(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor
) -> Tensor:
    mask, at = keep(length), torch.arange(1) + length
    keys, values = keys.index_copy_(2, at, k), values.index_copy_(2, at, v)
    return F.scaled_dot_product_attention(q, repeated(keys), repeated(values), mask)


def written_out(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor
) -> Tensor:
    mask = keep(length)
    keys[:, :, length], values[:, :, length] = k, v
    length.add_(1)
    scores = (q @ repeated(keys).mT * WIDTH**-0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ repeated(values)


TAKEN = [static, returned_by_the_write, written_out]


@pytest.mark.parametrize("filled", [0, 5, LENGTH - 1])
@pytest.mark.parametrize("f", TAKEN)
def test_taken(f: Callable[..., Tensor], filled: int) -> None:
    compiled = Compiled(f)
    ours, theirs = tensors(filled=filled), tensors(torch.float64, filled)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**ours).double(), f(**theirs), rtol=1e-5, atol=1e-5)
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name].to(wanted.dtype), wanted, rtol=1e-5, atol=1e-5)
    assert len(compiled.variants) == 1


@pytest.mark.parametrize("f", TAKEN)
def test_one_graph_for_all_lengths(f: Callable[..., Tensor]) -> None:
    """Both engines see the mask of the length that was, and write where it was."""
    records: list[Compilation] = []
    ours, theirs = tensors(), tensors()
    run = compiler(records)(f)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(run(**ours), f(**theirs))
            torch.testing.assert_close(ours, theirs)
    assert len(records) == 1
    assert [each.pattern for each in records[0].rewrites].count("updates") == 2


def test_on_a_gpu_no_key_is_repeated() -> None:
    """The template takes the caches as they lie, and the mask as a program."""

    class Planned(Compiled):
        def _backend(self, gm: Any, inputs: list[Any]) -> Callable[..., Any]:
            with planned_for((9, 0)):
                super()._backend(gm, inputs)
            return gm.forward

    compiled = Planned(static)
    with torch.no_grad():
        compiled(**tensors(torch.bfloat16))
    assert compiled.variants == ["program+gqa+mask"]


def written_between(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor
) -> Tensor:
    scores = q @ repeated(keys).mT
    values.index_copy_(2, length, v)
    keys.index_copy_(2, length, k)
    return scores.softmax(-1) @ repeated(values)


def old_keys(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor
) -> Tensor:
    """Copied before they are written."""
    old = repeated(keys)
    keys.index_copy_(2, length, k)
    return F.scaled_dot_product_attention(q, old, repeated(values))


def written_again(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor
) -> Tensor:
    seen = repeated(keys.index_copy_(2, length, k))
    keys.index_copy_(2, length + 1, k * 3)
    return F.scaled_dot_product_attention(q, seen, repeated(values))


@pytest.mark.parametrize("f", [written_between, old_keys, written_again])
def test_declined(f: Callable[..., Tensor]) -> None:
    compiled = Compiled(f)
    ours, theirs = tensors(), tensors()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**ours), f(**theirs))
    torch.testing.assert_close(ours, theirs)
    assert compiled.variants == []
    assert "writes what the attention reads" in compiled.misses[0]


def mask_counted_on(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor
) -> Tensor:
    """A mask of a buffer of booleans that is written before the attention, and read before that."""
    first = length.bool().view(1, 1, 1, 1).expand(3, 1, 1, LENGTH) & keep(length)
    length.fill_(0)
    return F.scaled_dot_product_attention(q, repeated(keys), repeated(values), first)


def test_the_mask_is_of_what_was_there() -> None:
    compiled = Compiled(mask_counted_on)
    ours, theirs = tensors(), tensors()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**ours), mask_counted_on(**theirs))
    assert len(compiled.variants) == 1


def handed_out(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """A cache that holds nothing yet becomes copies, which the caller gets."""
    q, k, v = (x.view(3, LENGTH, 2, WIDTH).transpose(1, 2) for x in (q, k, v))
    nothing = torch.empty(0)
    keys, values = torch.cat([nothing, k * 2], -2), torch.cat([nothing, v * 3], -2)
    return F.scaled_dot_product_attention(q, keys, values), keys, values


@pytest.mark.parametrize("training", [False, True])
def test_a_copy_that_is_handed_out_is_read(training: bool) -> None:
    """Without gradients: with them, both directions go by what it is a copy of."""
    compiled = Compiled(handed_out)
    given = [torch.randn(3, LENGTH, 2 * WIDTH, requires_grad=training) for _ in range(3)]
    with torch.set_grad_enabled(training):
        found = compiled(*given)
        torch.testing.assert_close(found, handed_out(*given))
    (call,) = compiled.calls
    (output,) = compiled.graphs[0].graph.find_nodes(op="output")
    read = set(call.all_input_nodes) & set(output.all_input_nodes)
    assert len(read) == (0 if training else 2)
