"""A whole training step, and what is best of several."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import models
from benchmarks.peers import PEERS
from benchmarks.step import UPDATES, beside_best, update, whole_step


def test_ours_over_the_best_peer_whatever_its_update() -> None:
    rows = [
        {"name": "fused", "eager ms": 9.0, "inductor ms": 5.0, "ours ms": 4.0, "ours GiB": 1.0},
        {"name": "compiled", "inductor ms": 4.0, "inductor spread ms": 0.1, "ours ms": 3.0},
    ]
    assert beside_best(rows) == {
        "best peer": "inductor, compiled, 4 ms",
        "ours, fused, over the best peer": 1.0,
        "ours, compiled, over the best peer": 0.75,
    }
    assert beside_best([{"name": "fused", "ours ms": 4.0, "inductor ms": None}]) == {}


def test_a_step_is_one_row_an_update() -> None:
    found = models.phases(argparse.Namespace(phase="train,step", quick=True))
    assert found == ("train", "step, fused AdamW", "step, compiled AdamW")
    assert models.phases(argparse.Namespace(phase="", quick=False)) == models.PHASES


def test_a_step_updates_after_the_gradients() -> None:
    module = torch.nn.Linear(3, 1)
    before = module.weight.detach().clone()

    def gradients() -> torch.Tensor:
        module.zero_grad()
        loss = module(torch.ones(2, 3)).sum()
        loss.backward()
        return loss.detach()

    step = whole_step(gradients, update(module, PEERS["eager"], UPDATES[0]))
    first, second = step(), step()
    assert not torch.equal(module.weight, before)
    assert second < first
    with pytest.raises(ValueError, match="eager compiles nothing"):
        update(module, PEERS["eager"], UPDATES[1])
