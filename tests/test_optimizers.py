"""Compiled optimizer steps: parameters and states as in eager over steps, in few launches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from iocompiler.backend import Compiler
from iocompiler.compilation import Compilation
from iocompiler.plan.data import AtenStep
from tests.compiling import OLD_TORCH

SHAPES = ((5, 7), (33,), (4, 4, 3), (1,), (), (129, 17), (33,), (5, 7))
Make = Callable[[list[Tensor], bool], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p, each: SGD(p, lr=0.1, foreach=each),
    "momentum": lambda p, each: SGD(
        p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True, foreach=each
    ),
    "adam": lambda p, each: Adam(p, lr=1e-2, weight_decay=0.01, foreach=each),
    "adamw": lambda p, each: AdamW(p, lr=1e-2, foreach=each),
    "amsgrad": lambda p, each: AdamW(p, lr=1e-2, amsgrad=True, foreach=each),
    "rmsprop": lambda p, each: RMSprop(p, lr=1e-2, momentum=0.9, foreach=each),
    "adagrad": lambda p, each: Adagrad(p, lr=1e-2, foreach=each),
    "nadam": lambda p, each: NAdam(p, lr=1e-2, foreach=each),
}


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "each"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_like_eager(name: str, foreach: bool) -> None:
    _check(lambda p: OPTIMIZERS[name](p, foreach))


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "each"])
def test_capturable(foreach: bool) -> None:
    """Step counts in tensors; eager takes them on a GPU only, so that it counts in numbers here."""

    def capturable(optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group["capturable"] = True

    _check(lambda p: AdamW(p, lr=1e-2, foreach=foreach), capturable)


def test_a_rate_in_a_tensor_changes_without_a_new_graph() -> None:
    def lower(optimizer: Optimizer) -> None:
        optimizer.param_groups[0]["lr"].mul_(0.5)

    records = _check(lambda p: AdamW(p, lr=torch.tensor(1e-2), foreach=False), between=lower)
    assert len(records) == 1


SPECIALIZED = pytest.mark.skipif(OLD_TORCH, reason="Dynamo compiles a graph for each rate")


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "each"])
@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=SPECIALIZED) for name in ("sgd", "momentum")), "adamw"],
)
def test_a_rate_that_is_a_number_changes_with_one_more_graph(name: str, foreach: bool) -> None:
    def lower(optimizer: Optimizer) -> None:
        optimizer.param_groups[0]["lr"] *= 0.5

    records = _check(lambda p: OPTIMIZERS[name](p, foreach), between=lower)
    assert len(records) == 2  # Dynamo takes a number for a constant until it changes


@pytest.mark.skipif(OLD_TORCH, reason="Dynamo compiles a graph for each value")
@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "each"])
@pytest.mark.parametrize("name", ["adam", "adamw", "amsgrad", "nadam"])
def test_betas_that_change_with_one_more_graph(name: str, foreach: bool) -> None:
    """As under OneCycleLR, which moves them against the rate."""

    def move(optimizer: Optimizer) -> None:
        group = optimizer.param_groups[0]
        group["lr"] *= 0.7
        group["betas"] = (group["betas"][0] - 0.02, group["betas"][1] - 0.001)

    records = _check(lambda p: OPTIMIZERS[name](p, foreach), between=move)
    assert len(records) == 2


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "each"])
def test_clipped_gradients(foreach: bool) -> None:
    _check(lambda p: AdamW(p, lr=1e-2, foreach=foreach), clip=1.0)


def _check(
    make: Callable[[list[Tensor]], Optimizer],
    prepare: Callable[[Optimizer], None] | None = None,
    between: Callable[[Optimizer], None] | None = None,
    clip: float = 0.0,
) -> list[Compilation]:
    """``prepare`` is done to the compiled optimizer, ``between`` to both after each step."""
    records: list[Compilation] = []
    backend = Compiler(engine="reference", strict=True, on_compiled=records.append)
    ours, theirs = _parameters(), _parameters()
    optimizers = make(ours), make(theirs)
    if prepare is not None:
        prepare(optimizers[0])
    steps = _step(optimizers[0], ours, clip), _step(optimizers[1], theirs, clip)
    steps = torch.compile(steps[0], backend=backend), steps[1]
    for count in range(4):
        for parameters, optimizer, step in zip((ours, theirs), optimizers, steps, strict=True):
            _draw_gradients(parameters, count)
            step()
            if between is not None:
                between(optimizer)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
            states = optimizers[0].state[one], optimizers[1].state[other]
            for key, value in states[1].items():
                if isinstance(value, Tensor):
                    torch.testing.assert_close(states[0][key], value, rtol=1e-5, atol=1e-6)
    assert len(records) <= 2  # the first step of a momentum makes its buffers
    launched = [step for plan in records[-1].plans.values() for step in plan.steps]
    assert len(launched) <= 4
    assert not any(isinstance(step, AtenStep) for step in launched)
    return records


def _parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def _draw_gradients(parameters: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def _step(optimizer: Optimizer, parameters: list[Tensor], clip: float) -> Callable[[], None]:
    def step() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()

    return step
