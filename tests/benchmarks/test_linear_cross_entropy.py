"""A linear head with cross-entropy: what each peer runs, and the rows of one shape."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import pytest
import torch
import torch._inductor.config as config
import torch.nn.functional as F

from benchmarks import linear_cross_entropy as group
from benchmarks import linear_cross_entropy_peers as others
from benchmarks import peers
from benchmarks.harness import Session
from benchmarks.table import Table
from iocompiler.ops import linear_cross_entropy_chunks as chunks

SHAPE = (32, 8, 64)
HAS_FUNCTION = hasattr(F, "linear_cross_entropy")


def _session(**more: Any) -> Session:
    settings = {
        "quick": True,
        "limit": 100.0,
        "only": "",
        "json": None,
        "check": False,
        "caches": None,
    }
    settings |= {"steps": 3, "budget": 0.01, "chunks": ()}
    return Session(argparse.Namespace(**{**settings, **more}), Table("t", group.COLUMNS))


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours runs as eager does, and Liger is nowhere."""
    monkeypatch.setitem(peers.PEERS, "ours", peers.Peer("ours", None))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)


@pytest.mark.usefixtures("cheap")
def test_a_peer_that_fails_is_a_note_and_the_others_are_beside_ours() -> None:
    session = _session(check=True)
    group.measure(session, group.problem(SHAPE), ("eager", "liger", "ours"))
    products, eager, liger, ours = session.table.rows
    assert "liger_kernel" in str(liger["note"])
    assert liger["ours/peer"] is None
    assert "note" not in eager | ours
    assert str(ours["check"]).startswith("ok")
    assert eager["ours/peer"] == pytest.approx(ours["ms"] / eager["ms"])
    assert eager["over products"] == pytest.approx(eager["ms"] / products["ms"])
    name = "32 x 8 x 64"
    assert session.table.summary[f"{name}: best peer"].startswith("eager, step")
    over = session.table.summary[f"{name}: ours, step, over the best peer"]
    assert over == pytest.approx(ours["ms"] / eager["ms"])


@pytest.mark.usefixtures("cheap")
def test_scratches_are_rows_of_ours_and_leave_the_setting() -> None:
    before = chunks.SCRATCH_BYTES
    session = _session(chunks=(1, 2))
    given = group.problem(SHAPE)
    group.measure(session, given, ("ours",))
    assert [row["peer"] for row in session.table.rows][2:] == ["ours, 1 MiB", "ours, 2 MiB"]
    assert before == chunks.SCRATCH_BYTES
    with group.scratch(128 * 64 * 2):
        assert group.problem((512, 8, 64)).chunk_rows == 128


@pytest.mark.usefixtures("cheap")
def test_distillation_is_compared_and_timed() -> None:
    session = _session(check=True)
    group.measure(session, group.problem((16, 8, 32, 8), group.distilled), ("ours",))
    assert str(session.table.rows[-1]["check"]).startswith("ok")
    assert session.table.rows[-1]["name"] == "distilled 16 x 8 x 32, teacher 8"


@pytest.mark.skipif(not HAS_FUNCTION, reason="torch 2.13's")
@pytest.mark.parametrize("name", ["torch", "torch-chunked", "torch-large-chunks"])
def test_what_stands_instead_is_the_same_loss(name: str) -> None:
    given = group.problem(SHAPE)
    exact = group.loss(*(t.double() if t.is_floating_point() else t for t in given.given))
    with others.running(name, given.loss, 8) as run:
        given.step(run)()
        torch.testing.assert_close(run(*given.given).float(), exact, rtol=2e-2, atol=0)
    mine = [tensor.grad.clone() for tensor in given.given[:2]]
    given.step(given.loss)()
    for own, tensor in zip(mine, given.given, strict=False):
        torch.testing.assert_close(own, tensor.grad, rtol=5e-2, atol=5e-4)


def test_the_chunker_is_set_until_the_block_ends() -> None:
    with others.running(others.CHUNKER, group.loss, 8):
        assert config.auto_chunker.enable
    assert not config.auto_chunker.enable


def test_a_chunker_that_did_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    session = _session()
    group.measure(session, group.problem(SHAPE), (others.CHUNKER,))
    assert "nothing was chunked" in str(session.table.rows[-1]["note"])


def test_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, sizes in (
        ([], ()),
        (["--chunks"], group.SCRATCHES),
        (["--chunks", "512,768"], (512, 768)),
    ):
        monkeypatch.setattr("sys.argv", ["linear_cross_entropy", *given])
        args = group.arguments()
        assert args.chunks == sizes
        assert others.chosen(args.peers) == others.DEFAULT
    with pytest.raises(SystemExit, match="no peer 'nobody'"):
        others.chosen("nobody")
