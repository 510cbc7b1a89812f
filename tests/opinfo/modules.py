"""The modules torch tests itself with, as calls of `check`: with gradients, train and eval."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.testing._internal.common_modules import module_db

from tests.opinfo.check import Call, problems
from tests.opinfo.exceptions import RANDOM, excepted

MODULES = {info.name: info for info in module_db}


def forward_and_backward(name: str, train: bool, count: int = 2) -> list[str]:
    """Problems of a few constructions in float32, in training or evaluation mode."""
    info = MODULES[name]
    if torch.float32 not in info.dtypes:
        return []
    torch.manual_seed(0)
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=True, training=train
    )
    chosen = list(itertools.islice(inputs, 12))
    step = max(1, len(chosen) // count)
    calls = [_call(name, i, chosen[i], train) for i in range(0, len(chosen), step)][:count]
    return problems([c for c in calls if not excepted(c.label)], differentiate=True)


def _call(name: str, position: int, given: Any, train: bool) -> Call:
    build, forward = given.constructor_input, given.forward_input
    torch.manual_seed(1)
    module = MODULES[name].module_cls(*build.args, **build.kwargs).float().train(train)
    module(*forward.args, **forward.kwargs)  # lazy ones learn their sizes
    mode = "train" if train else "eval"
    # parameters and buffers are inputs: they get gradients, or are written, as any other
    state = dict([*module.named_parameters(), *module.named_buffers()])
    random = train and name in RANDOM
    label = f"{name} {mode} construction {position}"
    return Call(label, _functional(module), (state, *forward.args), forward.kwargs, random)


def _functional(module: nn.Module) -> Callable[..., Any]:
    def call(state: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(module, state, args, kwargs)

    return call
