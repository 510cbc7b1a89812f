"""A whole training step: forward, backward and AdamW's update, the update by one kernel of torch's
own (``fused=True``) or compiled by the peer (``torch.compile(optimizer.step)``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import times
from benchmarks.peers import Peer
from benchmarks.table import Row, ratio

UPDATES = ("fused AdamW", "compiled AdamW")
_SETTINGS = {"lr": 1e-4, "weight_decay": 0.01}


def update(module: nn.Module, peer: Peer, kind: str) -> Callable[[], Any]:
    """One of `UPDATES` over the parameters of ``module``.

    Raises:
        ValueError: the peer compiles nothing, and is asked to.
    """
    parameters = list(module.parameters())
    if kind == "fused AdamW":
        return torch.optim.AdamW(parameters, fused=True, **_SETTINGS).step
    if peer.backend is None:
        raise ValueError(f"{peer.name} compiles nothing")
    on_gpu = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, foreach=True, capturable=on_gpu, **_SETTINGS)
    return peer.compile(optimizer.step)


def whole_step(gradients: Callable[[], Tensor], then: Callable[[], Any]) -> Callable[[], Tensor]:
    """Forward and backward, then the update; returns the loss before it."""

    def step() -> Tensor:
        loss = gradients()
        then()
        return loss

    return step


def beside_best(rows: Sequence[Row]) -> Row:
    """Of a model's rows, one an update: ours over the best peer's, whatever its update is.

    A peer of ours is one whose name begins with "ours"; what was not measured does not count.
    """
    found_times = {
        (peer, str(row["name"])): time for row in rows for peer, time in times(row).items()
    }
    theirs = {at: time for at, time in found_times.items() if not at[0].startswith("ours")}
    if not theirs:
        return {}
    best = min(theirs, key=lambda at: theirs[at])
    found: Row = {"best peer": f"{best[0]}, {best[1]}, {theirs[best]:.3g} ms"}
    for (peer, row), time in found_times.items():
        if peer.startswith("ours"):
            found[f"{peer}, {row}, over the best peer"] = ratio(time, theirs[best])
    return found
