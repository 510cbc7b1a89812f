"""A step to be timed, of a model or a module as a peer runs it: its weights in place, nothing
compiled before its first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import models, modules, timing
from benchmarks.model_zoo import Model
from benchmarks.module_zoo import Case
from benchmarks.peers import Peer

Step = Callable[[], Any]


def model_step(model: Model, train: bool, peer: Peer, quick: bool) -> Step:
    """In bfloat16, attention written plainly: forward and backward, or forward alone."""
    device = timing.device()
    module = model.module("eager", quick, device).to(torch.bfloat16).train(train)
    inputs = model.inputs(quick, device, torch.bfloat16, seed=1)
    function = peer.compile(module)
    if train:
        return models.training_step(module, function, inputs)
    return models.forward(function, inputs)


def module_step(case: Case, peer: Peer, quick: bool) -> Step:
    """Forward and backward."""
    device = timing.device()
    module = case.module(quick, device).to(case.dtype)
    inputs = case.inputs(quick, device, seed=1)
    return modules.training_step(module, peer.compile(module), inputs)
