"""A model over changing batches and lengths: compiled once more than once at most, gradients as in
eager; sizes 0 and 1, which Dynamo compiles for themselves, are right too.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iocompiler as ioc
from iocompiler.compilation import Compilation
from tests.models.gpt import GPT
from tests.runtime.text_engine import TextEngine


def _compiled(model: nn.Module, engine: Any, **options: Any) -> tuple[Any, list[Compilation]]:
    records: list[Compilation] = []
    backend = ioc.Compiler(engine=engine, strict=True, on_compiled=records.append)
    return torch.compile(model, backend=backend, **options), records


def _loss_and_gradients(
    run: Callable[..., Tensor], model: nn.Module, batch: int, length: int
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * batch + length)
    tokens = torch.randint(0, model.vocabulary, (batch, length + 1), generator=generator)
    loss = run(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [loss.detach(), *gradients]


def _agree(run: Any, model: nn.Module, reference: nn.Module, batch: int, length: int) -> None:
    ours = _loss_and_gradients(run, model, batch, length)
    theirs = _loss_and_gradients(reference, reference, batch, length)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("engine", ["reference", "text"])
def test_fifty_batches_and_lengths(engine: str) -> None:
    torch.manual_seed(0)
    model, chance = GPT(), random.Random(0)
    reference = copy.deepcopy(model)
    run, records = _compiled(model, TextEngine() if engine == "text" else engine)
    for _ in range(50 if engine == "reference" else 10):
        _agree(run, model, reference, chance.randint(2, 6), chance.randint(2, 40))
    assert len(records) <= 2  # the first sizes, then all sizes


def test_fifty_sizes_at_once_where_they_are_dynamic_from_the_first() -> None:
    torch.manual_seed(0)
    model, chance = GPT(layers=1), random.Random(1)
    reference = copy.deepcopy(model)
    run, records = _compiled(model, "reference", dynamic=True)
    for _ in range(50):
        _agree(run, model, reference, chance.randint(2, 6), chance.randint(2, 40))
    assert len(records) == 1


def test_sizes_zero_and_one() -> None:
    torch.manual_seed(0)
    model = GPT(layers=1)
    reference = copy.deepcopy(model)
    run, records = _compiled(model, "reference")
    sizes = [(3, 5), (4, 7), (1, 7), (4, 1), (1, 1), (0, 7), (4, 0), (5, 9), (1, 6), (0, 3)]
    for batch, length in sizes:
        _agree(run, model, reference, batch, length)
    # one for all sizes, the first one's, and one for each dimension that is 0 or 1
    assert len(records) <= 9
