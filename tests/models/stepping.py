"""A few training steps with a compiled model and a compiled AdamW, as results to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.accuracy import Results
from tests.models.zoo import CASES, Size

Compile = Callable[[Any], Any]


def adamw_steps(dtype: torch.dtype, size: Size, device: str, compile_fn: Compile | None) -> Results:
    """Parameters and moments after three steps from weights and inputs rounded to bf16.

    ``eps`` is large, so that an update does not turn on the sign of a gradient that is nearly zero.
    """
    module = CASES["mlp"].module(size).to(device, torch.bfloat16).to(dtype)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=1e-2, eps=1e-3, foreach=True, capturable=device != "cpu"
    )
    call, update = module, optimizer.step
    if compile_fn is not None:
        call, update = compile_fn(module), compile_fn(optimizer.step)
    for seed in range(3):
        x = CASES["mlp"].inputs(size, seed)["x"].detach().to(device, torch.bfloat16).to(dtype)
        optimizer.zero_grad()
        # not of the squares, whose mean is one after a norm, whatever the weights
        call(x).exp().mean().backward()
        with steps_counted_in(dtype):
            update()
    values = {name: p.detach() for name, p in module.named_parameters()}
    for name, parameter in module.named_parameters():
        state = optimizer.state[parameter]
        values |= {f"{key} {name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    return Results(values, {})


@contextmanager
def steps_counted_in(dtype: torch.dtype) -> Iterator[None]:
    """An optimizer counts in the default dtype. In float32 a reference would round 1 - beta**step
    as eager does, and eager's error there would not be seen.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtype == torch.float64 else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
