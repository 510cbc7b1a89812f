"""Every model of the zoo through the backend's CPU path, against float64: forward and training
step."""

from __future__ import annotations

import pytest
import torch

from iocompiler.backend import Compiler
from tests.accuracy import assert_as_accurate_as_eager, compare
from tests.models.stepping import adamw_steps
from tests.models.zoo import CASES, LAYERS, PLAIN, SDPA, TINY, Case

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SLOW = pytest.mark.slow
# with backend="inductor" alone too, whatever was compiled before it in the process; seen on an AMD
# EPYC with torch 2.13. What we do to the block is tested in test_reference.py.
CORRUPTED = pytest.mark.skip(reason="Inductor's code for the convolutions corrupts the heap")


def _cases() -> list[object]:
    """A training step in float32 of each plain model and layer always; the rest is slow."""
    found = []
    for case in (*PLAIN, *SDPA, *LAYERS):
        for train in (True, False):
            for dtype in (FLOAT32, BFLOAT16):
                quick = train and dtype == FLOAT32 and case not in SDPA
                label = f"{case}-{'train' if train else 'forward'}-{str(dtype)[6:]}"
                marks = () if quick else (SLOW,)
                if case.name == "residual-block":
                    marks = (CORRUPTED,)
                found.append(pytest.param(case, train, dtype, id=label, marks=marks))
    return found


@pytest.mark.parametrize(("case", "train", "dtype"), _cases())
def test_is_as_accurate_as_eager(case: Case, train: bool, dtype: torch.dtype) -> None:
    assert_as_accurate_as_eager(
        case.module,
        case.draws(dtype),
        lambda module: torch.compile(module, backend=Compiler()),
        dtype=dtype,
        train=train,
    )


@pytest.mark.parametrize("dtype", [FLOAT32, pytest.param(BFLOAT16, marks=SLOW)], ids=str)
def test_a_compiled_optimizer_steps_like_eager(dtype: torch.dtype) -> None:
    compiled = adamw_steps(dtype, TINY, "cpu", lambda f: torch.compile(f, backend=Compiler()))
    eager, wide = (adamw_steps(d, TINY, "cpu", None) for d in (dtype, torch.float64))
    bad = [str(c) for c in compare(compiled, eager, wide, dtype) if not c.ok]
    assert not bad


@SLOW
@pytest.mark.parametrize("name", ["bert-eager", "gpt2-sdpa", "encoder-layer"])
def test_autocast(name: str) -> None:
    case = CASES[name]
    assert_as_accurate_as_eager(
        case.module,
        case.draws(BFLOAT16),
        lambda module: torch.compile(module, backend=Compiler()),
        dtype=FLOAT32,
        autocast=BFLOAT16,
    )


def test_a_seed_repeats_a_step_with_dropout() -> None:
    case = CASES["mlp"]
    module = case.module(dropout=0.5).train()
    compiled = torch.compile(module, backend=Compiler())
    x = case.inputs()["x"]

    def step(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        module.zero_grad()
        out = compiled(x)
        out.square().sum().backward()
        return out.detach(), module.down.weight.grad.clone()

    first, second, other = step(1), step(1), step(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
