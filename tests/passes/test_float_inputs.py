"""Python floats that change: one graph for all their values, results as in eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from iocompiler.plan.data import KernelStep
from tests.compiling import OLD_TORCH, compiled

CASES: dict[str, Callable[..., Any]] = {
    "multi-tensor, new": lambda x, y, s: torch._foreach_mul([x, y], s),
    "two lists": lambda x, y, s: torch._foreach_sub([x, y], [y, x], alpha=s),
    "divided": lambda x, y, s: torch._foreach_div([x, y], 1 + s),
    "alpha": lambda x, y, s: torch.add(x, y, alpha=s) - torch.sub(y, x, alpha=2 * s),
    "value": lambda x, y, s: torch._foreach_addcmul([x, y], [y, x], [x, x], s),
    "between": lambda x, y, s: torch.lerp(x, y, s) + torch.lerp(x, y, 1 - s),
    "between, of each": lambda x, y, s: torch._foreach_lerp([x, y], [y, x], s),
    "a power of it": lambda x, y, s: (2 + s) ** x,
    "powers of it": lambda x, y, s: torch._foreach_pow(2 + s, [x, y]),
    "filled": lambda x, y, s: x + torch.full_like(y, s) + torch.full((7,), 2 * s),
    "filled, of its dtype": lambda x, y, s: x.new_full((5, 7), s) * torch.scalar_tensor(s),
    "a quotient": lambda x, y, s: torch.addcdiv(x, y, x.exp(), value=s),
}


COMPUTED = ("divided", "a power of it", "powers of it")


def _written(x, y, s):
    torch._foreach_add_([x, y], [y.sin(), x.sin()], alpha=-s)
    x.addcmul_(y, y, value=s)
    x.lerp_(y, s)
    torch._foreach_lerp_([y], [x], 0.1 + s / 10)  # Dynamo asks on which side of a half it is
    torch._foreach_addcdiv_([y], [x], [x.abs() + 1], s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CASES, "written"])
def test_one_graph_for_all_values(name: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    f = CASES.get(name, _written)
    run, records = compiled(f)
    torch.manual_seed(0)
    for s in (0.5, 0.3, -0.25, 2.0):
        ours = [torch.randn(5, 7).to(dtype), torch.randn(5, 7).to(dtype)]
        theirs = [x.clone() for x in ours]
        few = {"rtol": 1e-5, "atol": 1e-4}
        tolerance = few if dtype == torch.float32 else {"rtol": 3e-2, "atol": 0.2}
        torch.testing.assert_close(run(*ours, s), f(*theirs, s), **tolerance)
        torch.testing.assert_close(ours, theirs, **tolerance)
    # the first value is taken for a constant; by an old torch, all that numbers are computed from
    assert len(records) == (4 if OLD_TORCH and name in COMPUTED else 2)


def test_numbers_that_are_constants_stay_where_they_are() -> None:
    torch._dynamo.reset()
    run, records = compiled(lambda x, y: torch.add(x, y, alpha=0.5))
    run(torch.randn(3), torch.randn(3))
    (add,) = (n for n in records[0].graph.graph.nodes if n.op == "call_function")
    assert add.kwargs == {"alpha": 0.5}


@pytest.mark.skipif(OLD_TORCH, reason="a graph for each value")
def test_what_is_computed_of_it_is_no_call() -> None:
    torch._dynamo.reset()
    f = lambda x, s: (x * (1 / s)).softmax(-1) - 2**s
    run, records = compiled(f, engine="reference")
    x = torch.randn(5, 7)
    for s in (0.5, 0.25, 3.0):
        torch.testing.assert_close(run(x, s), f(x, s))
    assert len(records) == 2
    (step,) = records[1].plans["inference"].steps
    assert isinstance(step, KernelStep)
