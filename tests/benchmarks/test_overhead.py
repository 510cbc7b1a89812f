"""Training steps by four clocks."""

from __future__ import annotations

import argparse
import time
from typing import Any

import pytest
import torch

from benchmarks import attention, overhead, overhead_steps, subjects, timing
from benchmarks.harness import Session
from benchmarks.table import Table


def _args(**more: Any) -> argparse.Namespace:
    settings = {
        "quick": True,
        "limit": 100.0,
        "only": "",
        "json": None,
        "flex": True,
        "caches": None,
    }
    settings |= {"steps": 3, "budget": 0.01, "peers": "eager", "length": 64, "width": 16}
    return argparse.Namespace(**{**settings, **more})


def test_every_step_runs() -> None:
    found = overhead_steps.subjects(_args())
    assert list(found) == ["attention, window 512", "encoder layer", "gpt2"]
    for makers in found.values():
        makers["eager"]()()


def test_attention_makes_its_gradients_anew() -> None:
    step, given = attention.training_step(
        next(case for case in attention.CASES if case.name == overhead_steps.WINDOW),
        attention.Sizes(1, 2, 64, 16),
        lambda function: function,
    )
    step()
    first = given["q"].grad
    step()
    assert first is not None
    assert given["q"].grad is not first
    torch.testing.assert_close(given["q"].grad, first)


def test_flex_attention_runs_the_window_alone() -> None:
    found = overhead_steps.subjects(_args(quick=False, peers="inductor,ours"))
    assert [list(makers) for makers in found.values()] == [
        ["inductor", "ours", "flex"],
        ["inductor", "ours"],
        ["inductor", "ours"],
    ]
    without = overhead_steps.subjects(_args(quick=False, flex=False, peers="ours"))
    assert [list(makers) for makers in without.values()] == [["ours"]] * 3


def test_rows_have_all_clocks_and_what_fails_is_a_note() -> None:
    def fails() -> subjects.Step:
        raise ValueError("no kernel")

    threads: list[bool] = []

    def step() -> None:
        threads.append(torch.autograd.is_multithreading_enabled())

    session = Session(_args(), Table("t", []))
    makers = {"ours": lambda: step, "flex": fails, "inductor": lambda: lambda: time.sleep(0.002)}
    overhead_steps.measure(session, "s", makers)
    ours, flex, inductor = session.table.rows
    assert all(ours[clock] >= 0 for clock in overhead_steps.CLOCKS)
    assert set(threads) == {True, False}
    assert threads[-1] is False, "the caller's thread is the last clock"
    assert torch.autograd.is_multithreading_enabled()
    assert flex["note"] == "flex: ValueError: no kernel"
    assert inductor["host ms"] >= 2
    assert inductor["ours/peer, host"] == pytest.approx(ours["host ms"] / inductor["host ms"])
    assert flex["ours/peer, loop"] is None


def test_queueing_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(timing, "synchronize", lambda: order.append("wait"))
    found = timing.queueing(lambda: order.append("call"), 4, 1.0, warm_up=1)
    assert found.count == 4
    assert order == ["call", "wait", "call", "wait", *["wait", "call"] * 4]


@pytest.mark.parametrize(
    ("given", "peers", "only"),
    [
        ([], "eager,inductor,ours,inductor-graphs,ours-graphs", "gpt2,llama"),
        (["--part", "steps"], "inductor,ours", ""),
        (["--part", "steps", "--peers", "ours", "--only", "gpt2"], "ours", "gpt2"),
    ],
)
def test_the_command_line(
    given: list[str], peers: str, only: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["overhead", *given])
    args = overhead.arguments()
    assert (args.peers, args.only) == (peers, only)
