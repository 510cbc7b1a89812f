"""What a caller keeps of outputs that lie in memory the next step writes."""

from __future__ import annotations

import gc
from weakref import ref

import pytest
import torch

from iocompiler.runtime import kept as module
from iocompiler.runtime.kept import Kept


@pytest.fixture(autouse=True)
def _no_output_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL", 0)


def test_what_is_made_of_small_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL", 64)
    pool, large = torch.arange(4.0), torch.randn(40)
    kept = Kept()
    loss, part, other = kept.hand_out([pool[1], pool[2:].expand(3, 2), large], 3)
    views = [loss.detach(), part[0], loss[None]]
    expected = [view.clone() for view in views]
    pool.zero_()
    torch.testing.assert_close(views, expected)
    assert part.stride() == (0, 1)
    assert part.storage_offset() == 2
    assert other.data_ptr() == large.data_ptr()
    loss.fill_(7)  # both lie in one copy
    assert part.untyped_storage().data_ptr() == loss.untyped_storage().data_ptr()


def test_what_is_little_beside_the_graph_is_copied() -> None:
    pool = torch.randn(8), torch.randn(9)
    little, large = Kept().hand_out(pool, 2, little=8 * 4)
    assert little.data_ptr() != pool[0].data_ptr()
    assert large.data_ptr() == pool[1].data_ptr()


def test_what_is_held_is_moved_and_keeps_its_value() -> None:
    pool = torch.randn(4, 6)
    expected = pool.clone()
    kept = Kept()
    (held,) = kept.hand_out([pool], 1)
    assert held is not pool
    assert not held._is_view()
    assert held.data_ptr() == pool.data_ptr()
    kept.move()
    pool.zero_()
    torch.testing.assert_close(held, expected)


def test_only_what_is_held() -> None:
    pool = torch.randn(8)
    kept = Kept()
    seen = ref(kept.hand_out([pool], 1)[0])
    gc.collect()
    assert seen() is None
    kept.move()


def test_what_the_backward_is_saved_is_not_the_callers() -> None:
    outputs = [torch.randn(3), torch.randn(3), 7]
    handed = Kept().hand_out(outputs, 1)
    assert handed[0] is not outputs[0]
    assert handed[1] is outputs[1]
    assert handed[2] == 7


def test_strides_and_shared_memory_stay() -> None:
    storage = torch.randn(40)
    outputs = [storage.as_strided((3, 4), (1, 5), 2), storage.as_strided((2, 3), (0, 1), 3)]
    expected = [out.clone() for out in outputs]
    kept = Kept()
    held = kept.hand_out(outputs, 2)
    kept.move()
    storage.zero_()
    for one, value, out in zip(held, expected, outputs, strict=True):
        torch.testing.assert_close(one, value)
        assert (one.stride(), one.storage_offset()) == (out.stride(), out.storage_offset())
    held[0].fill_(1)
    assert held[1].eq(1).any()


def test_outputs_with_a_gradient_and_of_inference() -> None:
    w = torch.randn(5, requires_grad=True)
    kept = Kept()
    (held,) = kept.hand_out([torch.randn(5)], 1)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return held

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return 2 * gradient

    out = Function.apply(w)
    assert out is held
    before = held.data_ptr()
    kept.move()
    assert held.data_ptr() != before
    held.sum().backward()
    torch.testing.assert_close(w.grad, torch.full((5,), 2.0))

    with torch.inference_mode():
        (inferred,) = kept.hand_out([torch.ones(5)], 1)
    kept.move()
    assert inferred.is_inference()
    torch.testing.assert_close(inferred, torch.ones(5))


def test_gradients_that_autograd_keeps() -> None:
    parameters = [torch.randn(3, requires_grad=True) for _ in range(3)]
    kept = Kept()
    kept.watch([*parameters, 5, parameters[0] * 2])
    pool = [torch.randn(3) for _ in range(2)]
    kept.gradients(pool)
    own = torch.randn(3)
    for parameter, gradient in zip(parameters, [*pool, own], strict=True):
        parameter.grad = gradient.detach()
    expected = [parameter.grad.clone() for parameter in parameters]  # type: ignore[union-attr]
    kept.move()
    for each in pool:
        each.zero_()
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, value)
    assert parameters[2].grad.data_ptr() == own.data_ptr()  # type: ignore[union-attr]
