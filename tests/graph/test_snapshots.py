"""What is read of a counter before it is counted on is read of a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from iocompiler.graph import view
from iocompiler.graph.normalise import normalise
from iocompiler.pipeline import Pipeline

aten = torch.ops.aten
Captured = Callable[..., GraphModule]
X = torch.arange(6.0)


def copies(captured: Captured, f: Callable[..., Any], *inputs: Tensor) -> int:
    """How many there are after normalising; results and inputs are held against eager."""
    gm = captured(f, *[x.clone() for x in inputs])
    Pipeline(normalise).run(gm)
    ours, theirs = ([x.clone() for x in inputs] for _ in range(2))
    expected = f(*theirs)
    names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    given = dict(zip(("L_x_", "L_length_"), ours, strict=True))
    torch.testing.assert_close(gm(*map(given.get, names))[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    return len(list(view.calls(gm, aten.clone.default)))


def mask_of_a_cache(x: Tensor, length: Tensor) -> Tensor:
    keep = torch.arange(6) <= length
    length.add_(1)
    return torch.where(keep, x, 0.0)


def through_a_view(x: Tensor, length: Tensor) -> Tensor:
    at = length.view(1, 1) + 1
    length.add_(1)
    return x * at


def through_what_does_nothing(x: Tensor, length: Tensor) -> Tensor:
    at = length.to("cpu") + 1
    length.to("cpu").add_(1)
    return x * at


def read_behind_too(x: Tensor, length: Tensor) -> Tensor:
    at = length + 1
    length.add_(1)
    return x * at + length


def filled(x: Tensor, length: Tensor) -> Tensor:
    at = length + 1
    length.fill_(3)
    return x * at


@pytest.mark.parametrize(
    "f",
    [mask_of_a_cache, through_a_view, through_what_does_nothing, read_behind_too, filled],
)
@pytest.mark.parametrize("length", [torch.tensor([2]), torch.tensor([2], dtype=torch.int32)])
def test_taken(f: Callable[..., Tensor], length: Tensor, captured: Captured) -> None:
    assert copies(captured, f, X, length) == 1


def counted_twice(x: Tensor, length: Tensor) -> Tensor:
    a = x * length
    length.add_(1)
    b = x * length
    length.mul_(2)
    return a + b * length


def test_two_writes(captured: Captured) -> None:
    """What the first returns goes by another name."""
    assert copies(captured, counted_twice, X, torch.tensor([2])) == 1


def old_name_read_behind(x: Tensor, length: Tensor) -> Tensor:
    seen = length.view(1, 1)
    length.add_(1)
    return x * seen


def written_through_a_view(x: Tensor, length: Tensor) -> Tensor:
    at = length + 1
    length.view(1, 1).add_(1)
    return x * at


def only_read(x: Tensor, length: Tensor) -> Tensor:
    return x * (length + 1)


def only_written(x: Tensor, length: Tensor) -> Tensor:
    length.add_(1)
    return x * length


@pytest.mark.parametrize(
    "f", [old_name_read_behind, written_through_a_view, only_read, only_written]
)
def test_declined(f: Callable[..., Tensor], captured: Captured) -> None:
    assert copies(captured, f, X, torch.tensor([2])) == 0


@pytest.mark.parametrize("length", [torch.tensor([2.0]), torch.ones(1, 1, 1, 20)[..., :6]])
def test_floats_are_left_alone(length: Tensor, captured: Captured) -> None:
    assert copies(captured, filled, X, length) == 0


def test_what_is_large_is_left_alone(captured: Captured) -> None:
    assert copies(captured, filled, torch.arange(32.0), torch.arange(32)) == 0
