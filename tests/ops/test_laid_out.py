"""Copies in another order of storage, and the order of their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iocompiler.graph.storage_order import Order, is_both, lies_in, memory_format, order_of
from iocompiler.ops.laid_out import LAID_OUT

OTHER = {Order.FIRST: Order.LAST, Order.LAST: Order.FIRST}
SHAPES = [(2, 3, 4, 5), (2, 3, 4, 5, 2), (2, 3, 1, 1), (2, 1, 4, 5), (1, 1, 1, 1), (0, 3, 4, 5)]


def image(shape: tuple[int, ...], order: Order) -> Tensor:
    return torch.randn(shape).clone(memory_format=memory_format(order, len(shape)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", Order)
def test_strides_there_and_back(shape: tuple[int, ...], order: Order) -> None:
    x = image(shape, order).requires_grad_()
    y = LAID_OUT(x, memory_format(OTHER[order], len(shape)))
    assert torch.equal(x, y)
    assert y.data_ptr() != x.data_ptr() or x.numel() == 0
    assert order_of(y) is OTHER[order] or is_both(y)
    (grad,) = torch.autograd.grad((y * y).sum(), [x])
    torch.testing.assert_close(grad, 2 * x)
    assert lies_in(grad, order)


def test_gradients_of_what_lies_otherwise_come_as_they_are() -> None:
    x = torch.randn(2, 3, 4, 8)[..., ::2].requires_grad_()
    y = LAID_OUT(x, torch.channels_last)
    (grad,) = torch.autograd.grad(y.square().sum(), [x])
    torch.testing.assert_close(grad, 2 * x)


def test_second_derivatives() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    cubed = lambda x: LAID_OUT(x, torch.channels_last) ** 3
    assert torch.autograd.gradgradcheck(cubed, (x,))


def test_torchs_own_check() -> None:
    torch.library.opcheck(LAID_OUT, (torch.randn(2, 3, 4, 5), torch.channels_last))
    leaf = torch.randn(2, 3, 4, 5, requires_grad=True)
    torch.library.opcheck(LAID_OUT, (leaf, torch.channels_last))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_order_is_told_by_every_stride(shape: tuple[int, ...]) -> None:
    for order in Order:
        x = image(shape, order)
        assert lies_in(x, order)
        same = image(shape, OTHER[order]).stride() == x.stride()
        assert order_of(x) is (Order.FIRST if same else order)
    assert order_of(torch.randn(2, 3, 4, 8)[..., ::2]) is None
    assert not any(lies_in(torch.randn(2, 3, 4, 8)[..., ::2], order) for order in Order)


def test_other_ranks_have_one_order() -> None:
    assert order_of(torch.randn(2, 3)) is Order.FIRST
    assert order_of(torch.randn(2, 3).t()) is None
    assert not lies_in(torch.randn(2, 3, 4), Order.LAST)
