"""Whole training steps by four clocks: how much of a loop is the host's.

"loop ms" is a step behind another, "device ms" the same where the host has queued it before, "host
ms" what queueing it on an idle device takes, and "one thread ms" that with the backward in the
caller's thread (`torch.autograd.set_multithreading_enabled(False)`), where autograd's own threads
wait for nobody.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks import attention, timing
from benchmarks.attention_inputs import sizes
from benchmarks.attention_zoo import CASES as ATTENTIONS
from benchmarks.harness import Session, wanted
from benchmarks.model_zoo import MODELS
from benchmarks.module_zoo import CASES as MODULES
from benchmarks.peers import Peer, chosen
from benchmarks.subjects import Step, model_step, module_step
from benchmarks.table import Row, Table, ratio

CLOCKS = ("loop ms", "device ms", "host ms", "one thread ms")
WINDOW, LAYER, MODEL = "window 512", "encoder layer", "gpt2"

# Of a peer's name, what makes its step.
Makers = Mapping[str, Callable[[], Step]]


def run(args: argparse.Namespace) -> None:
    """Print and write the table."""
    columns = ["name", "peer", *CLOCKS, "ours/peer, loop", "ours/peer, host"]
    session = Session(args, Table("training steps, the host's time", columns))
    for name, makers in subjects(args).items():
        if wanted(name, args.only):
            measure(session, name, makers)
    session.table.finish(args.json)


def subjects(args: argparse.Namespace) -> dict[str, Makers]:
    """Each step by the peers that run it; FlexAttention takes part where it is attention alone."""
    peers, quick = chosen(args.peers), args.quick
    (case,) = (case for case in ATTENTIONS if case.name == WINDOW)
    (layer,) = (case for case in MODULES if case.name == LAYER)
    size = sizes(args, case)

    def windowed(compile_: attention.Compile) -> Callable[[], Step]:
        return lambda: attention.training_step(case, size, compile_)[0]

    windows = {peer.name: windowed(peer.compile) for peer in peers}
    if args.flex and not quick:
        windows[attention.FLEX] = windowed(partial(attention.flex, case))

    def of(make: Callable[[Peer], Step]) -> Makers:
        return {peer.name: partial(make, peer) for peer in peers}

    return {
        f"attention, {WINDOW}": windows,
        LAYER: of(lambda peer: module_step(layer, peer, quick)),
        MODEL: of(lambda peer: model_step(MODELS[MODEL], True, peer, quick)),
    }


def measure(session: Session, name: str, makers: Makers) -> None:
    """A row a peer, then ours over each."""
    rows: list[Row] = []
    for peer, make in makers.items():
        row: Row = {"name": name, "peer": peer}
        rows.append(row)
        session.table.rows.append(row)
        session.attempt(row, peer, partial(_clocked, session.args, make, row))
    ours = next((row for row in rows if row["peer"] == "ours"), {})
    for row in rows:
        for clock in ("loop", "host"):
            key = f"{clock} ms"
            row[f"ours/peer, {clock}"] = ratio(ours.get(key), row.get(key))


def _clocked(args: argparse.Namespace, make: Callable[[], Step], row: Row) -> None:
    step = make()
    row["loop ms"] = timing.steps(step, args.steps, args.budget, warm_up=10).ms
    row["device ms"] = timing.steps(step, args.steps, args.budget, queued=True).ms
    row["host ms"] = timing.queueing(step, args.steps, args.budget).ms
    with torch.autograd.set_multithreading_enabled(False):
        row["one thread ms"] = timing.queueing(step, args.steps, args.budget).ms
