"""The order of a chain of products: the best there is, by trying all."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from iocompiler.cost_model.device import device
from iocompiler.cost_model.product_order import Order, ProductOrders


def every(first: int, last: int) -> Iterator[Order]:
    if first == last:
        yield first
    for at in range(first, last):
        yield from ((a, b) for a in every(first, at) for b in every(at + 1, last))


@pytest.mark.parametrize("seed", range(8))
def test_is_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice([1, 8, 100, 512, 3000, 4096]) for _ in range(6)]
    outside = [draw.choice([(), (), (4,), (2, 4)]) for _ in sizes[1:]]
    shapes = [(*o, m, n) for o, m, n in zip(outside, sizes, sizes[1:], strict=False)]
    orders = ProductOrders(shapes, torch.bfloat16, device("h200"))
    times = [orders.seconds(order) for order in every(0, len(shapes) - 1)]
    assert len(times) == 14
    assert orders.seconds(orders.cheapest()) == pytest.approx(min(times))


def test_rows_of_a_batch_go_through_one_product() -> None:
    """[8, 128, 64] times one matrix is a product of 1024 rows, not eight that read it each."""
    given = torch.bfloat16, device("h200")
    batch = ProductOrders([(8, 128, 64), (64, 64)], *given)
    rows = ProductOrders([(1024, 64), (64, 64)], *given)
    assert batch.seconds((0, 1)) == rows.seconds((0, 1))


def test_the_smallest_product_is_found_inside() -> None:
    orders = ProductOrders([(9, 4), (4, 2), (2, 8)], torch.float32, device("h200"))
    assert orders.smallest(((0, 1), 2)) == (0, 1)
    assert orders.smallest((0, (1, 2))) == (1, 2)
    assert ProductOrders([(2, 9), (9, 5), (5, 1)], torch.float32, device("h200")).smallest(
        ((0, 1), 2)
    ) == ((0, 1), 2)
