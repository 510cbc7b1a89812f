"""First calls, each in a process of its own: with empty caches, then in a second process with the
caches filled.

Seconds are host time from calling the compiled model to the device being done, for a training step
forward and backward. Imports, building the model and the CUDA context are not in them; "whole s" is
the life of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.caches import variables
from benchmarks.harness import Session, add_geometric_mean, columns, parser, wanted
from benchmarks.model_zoo import MODELS
from benchmarks.models import forward, training_step
from benchmarks.peers import PEERS, Peer, chosen
from benchmarks.table import Row, Table, ratio

_PROCESS_LIMIT_S = 200.0
_MARK = "RESULT "


def main() -> None:
    args = arguments()
    if args.child:
        return _child(args)
    if args.quick and not args.only:
        args.only = "bert"
    peers = chosen(args.peers)
    shown = [
        "name",
        *columns(peers, "first s"),
        "ours/inductor",
        *columns(peers, "second s"),
        *columns(peers, "whole s"),
    ]
    session = Session(args, Table(f"compile time, attention {args.attention}, bf16", shown))
    for model in MODELS:
        for phase in args.phase.split(","):
            if wanted(f"{model} {phase}", args.only):
                _row(session, model, phase)
    add_geometric_mean(session.table)
    session.table.finish(args.json)
    return None


def arguments() -> argparse.Namespace:
    found = parser(__doc__, default_peers="inductor,ours")
    found.add_argument("--attention", default="eager", choices=["eager", "sdpa"])
    found.add_argument("--phase", default="train", help="train, forward or both")
    found.add_argument("--child", default="", help=argparse.SUPPRESS)
    return found.parse_args()


def _row(session: Session, model: str, phase: str) -> None:
    row: Row = {"name": f"{model} {phase}"}
    session.table.rows.append(row)
    for peer in session.peers:
        session.attempt(row, peer.name, partial(_measure, session.args, model, phase, peer, row))
    row["ours/inductor"] = ratio(row.get("ours first s"), row.get("inductor first s"))


def _measure(args: argparse.Namespace, model: str, phase: str, peer: Peer, row: Row) -> None:
    """Two processes on one folder of caches."""
    child = f"{model},{phase},{peer.name}"
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        row[f"{peer.name} first s"], row[f"{peer.name} whole s"] = _process(
            args, child, Path(folder)
        )
        row[f"{peer.name} second s"], _ = _process(args, child, Path(folder))


def _process(args: argparse.Namespace, child: str, caches: Path) -> tuple[float, float]:
    """First-call seconds inside a new process, and the seconds of its whole life."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.compile_time",
        "--child",
        child,
        "--attention",
        args.attention,
    ]
    command += ["--quick"] if args.quick else []
    environment = {**os.environ, **variables(caches)}
    start = time.perf_counter()
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_PROCESS_LIMIT_S,
        check=False,
    )
    whole = time.perf_counter() - start
    found = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not found:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise RuntimeError(f"exit status {done.returncode}: {last[0]}")
    return float(json.loads(found[-1][len(_MARK) :])["seconds"]), whole


def _child(args: argparse.Namespace) -> None:
    """In the new process: build, call once, print the seconds."""
    name, phase, peer = args.child.split(",")
    device = timing.device()
    model, train = MODELS[name], phase == "train"
    module = model.module(args.attention, args.quick, device).to(torch.bfloat16).train(train)
    inputs = model.inputs(args.quick, device, torch.bfloat16, seed=1)
    function = PEERS[peer].compile(module)
    call = training_step(module, function, inputs) if train else forward(function, inputs)
    _, seconds = timing.first_call(call)
    print(_MARK + json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
