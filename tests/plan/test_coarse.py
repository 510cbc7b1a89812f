"""Which quotients and roots of a user's program are computed coarsely, and that nobody sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.adamw import AdamW
from benchmarks.schedules import plan_on_fakes
from iocompiler.plan.data import KernelStep
from tests.plan.graphs import Planned, relative_error

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Function = Callable[..., Any]

# of a tensor of one of the short dtypes, and one like it above zero
COARSE: dict[str, Function] = {
    "a quotient": lambda x, y: x / y,
    "one by a number": lambda x, y: x / 0.3,
    "an inverse": lambda x, y: y.reciprocal() + 1,
    "a power": lambda x, y: x * y**-1,
    "a root": lambda x, y: x * y.sqrt(),
    "a root as a power": lambda x, y: x * y**0.5,
    "what is added to": lambda x, y: x - y / 3.5,
    "of float32, rounded": lambda x, y: (x.float() / y.float()).to(x.dtype),
    "a norm in float32": lambda x, y: (
        x.float() / (x.float().square().mean(-1, keepdim=True).sqrt() + 1e-6)
    ).to(x.dtype),
    "a softmax": lambda x, y: x.softmax(-1),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y, value=0.1),
}
EXACT: dict[str, Function] = {
    "rounded down": lambda x, y: (x / y).floor(),
    "divided with rounding": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "of float32": lambda x, y: x.float() / y.float(),
    "read in float32 too": lambda x, y: (lambda q: (q.to(x.dtype), q))(x.float() / y.float()),
    "compared": lambda x, y: torch.where(x / y > 0.5, x, y),
    "the end of a root": lambda x, y: (1 - y / y.amax()).sqrt().exp(),
    "the maximum": lambda x, y: (x / y).amax(-1),
}


def planned(function: Function, dtype: torch.dtype) -> tuple[set[str], float]:
    """The quotients and roots of its kernels, and the error of the plan's results against float64's
    over what eager's in this dtype may have.
    """
    torch.manual_seed(0)
    x = torch.randn(6, 40).to(dtype)
    y = (torch.rand(6, 40) + 0.5).to(dtype)
    plans = Planned()
    made, eager = plans(function)(x, y), function(x, y)
    wide = function(x.double(), y.double()) if dtype is not F32 else eager
    error = 0.0
    for got, plain, exact in zip(*map(_several, (made, eager, wide)), strict=True):
        allowed = 2 * relative_error(plain, exact) + 1e-5
        error = max(error, relative_error(got, exact) / allowed)
    rows = {op.fn for k in plans.kernels for op in k.program.ops if op.fn.endswith(("div", "sqrt"))}
    return rows, error


def _several(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", COARSE)
def test_coarse(name: str, dtype: torch.dtype) -> None:
    rows, error = planned(COARSE[name], dtype)
    assert rows & {"coarse_div", "coarse_sqrt"}
    assert error <= 1


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    rows, _ = planned(EXACT[name], BF16)
    assert rows & {"div", "sqrt"}


@pytest.mark.parametrize("name", [n for n in COARSE if "float32" not in n])
def test_float32_is_as_eager_has_it(name: str) -> None:
    rows, error = planned(COARSE[name], F32)
    assert rows
    assert not rows & {"coarse_div", "coarse_sqrt"}
    assert error <= 1


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_step_of_adamw(dtype: torch.dtype) -> None:
    """The corrections of its bias are float32 whatever the parameters are, which are divided by
    them alone: by what is rounded to bfloat16.
    """
    step = AdamW(width=64, count=1)
    layouts = step.layouts()
    wide = [name for name in layouts if dtype == F32 or name.startswith("step")]
    plan = plan_on_fakes(step.update, layouts, tuple(layouts), wide)
    ops = [op for each in plan.steps if isinstance(each, KernelStep) for op in each.program.ops]
    kinds = [op.fn for op in ops if op.fn.endswith(("div", "sqrt"))]
    coarse = [fn for fn in kinds if fn.startswith("coarse")]
    assert len(kinds) == 7
    assert len(coarse) == (7 if dtype == BF16 else 0)
