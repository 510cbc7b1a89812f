"""One module each, forward and forward + backward, peers side by side; L2 is flushed before every
repetition."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.harness import (
    Session,
    add_best,
    add_geometric_mean,
    add_ratio,
    columns,
    parser,
    verdict,
    wanted,
)
from benchmarks.model_zoo import without_dropout
from benchmarks.module_zoo import CASES, Case
from benchmarks.peers import Peer, chosen
from benchmarks.table import Row, Table
from tests.accuracy import compare_with_eager, named_outputs

PHASES = ("forward", "step")


def main() -> None:
    args = arguments()
    peers = chosen(args.peers)
    shown = ["name", *columns(peers, "ms"), "ours/inductor", "ours/best"]
    shown += columns(peers, "device ms", "GiB")
    shown += [*columns(tuple(p for p in peers if p.backend), "first s"), "check"]
    session = Session(args, Table("modules", shown))
    for case in CASES:
        for phase in phases(args):
            if wanted(f"{case.name} {phase}", args.only):
                _row(session, case, phase)
    add_geometric_mean(session.table)
    session.table.finish(args.json)


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--phase", default="", help="forward, step (with backward) or both")
    found.set_defaults(budget=1.0)
    return found.parse_args()


def phases(args: argparse.Namespace) -> tuple[str, ...]:
    """Both, unless told; small sizes only the one with gradients."""
    return tuple(args.phase.split(",")) if args.phase else ("step",) if args.quick else PHASES


def _row(session: Session, case: Case, phase: str) -> None:
    row: Row = {"name": f"{case.name} {phase}"}
    session.table.rows.append(row)
    device = timing.device()
    for peer in session.peers:
        if session.args.check and peer.name == "ours":
            check = partial(_check, session.args, case, phase == "step", peer, row, device)
            session.attempt(row, "check", check)
        measure = partial(_measure, session.args, case, phase == "step", peer, row, device)
        session.attempt(row, peer.name, measure)
    add_ratio(row)
    add_best(row)


def _measure(
    args: argparse.Namespace, case: Case, train: bool, peer: Peer, row: Row, device: str
) -> None:
    module = case.module(args.quick, device).to(case.dtype)
    inputs = case.inputs(args.quick, device, seed=1)
    function = peer.compile(module)
    call = training_step(module, function, inputs) if train else _forward(function, inputs)
    _, row[f"{peer.name} first s"] = timing.first_call(call)
    _clear(module, inputs)
    with timing.PeakMemory() as peak:
        call()
        _clear(module, inputs)
    row[f"{peer.name} GiB"] = peak.gib
    time = timing.steps(call, args.steps, args.budget, flush=True)
    row[f"{peer.name} ms"], row[f"{peer.name} spread ms"] = time.ms, time.spread_ms
    queued = timing.steps(call, args.steps, args.budget, flush=True, queued=True)
    row[f"{peer.name} device ms"] = queued.ms


def _clear(module: nn.Module, inputs: dict[str, Tensor]) -> None:
    for leaf in [*module.parameters(), *inputs.values()]:
        leaf.grad = None


def training_step(
    module: nn.Module, function: Callable[..., Any], inputs: dict[str, Tensor]
) -> Callable[[], None]:
    """Forward and backward from a fixed random cotangent (a scalar output: from one)."""
    with torch.no_grad():
        out = next(iter(named_outputs(module(**inputs)).values()))
    cotangent = torch.ones_like(out) if out.dim() == 0 else torch.randn_like(out)

    def step() -> None:
        _clear(module, inputs)
        torch.autograd.backward(next(iter(named_outputs(function(**inputs)).values())), cotangent)

    return step


def _forward(function: Callable[..., Any], inputs: dict[str, Tensor]) -> Callable[[], Any]:
    @torch.no_grad()
    def forward() -> Any:
        return function(**inputs)

    return forward


def _check(
    args: argparse.Namespace, case: Case, train: bool, ours: Peer, row: Row, device: str
) -> None:
    row["check"] = verdict(
        compare_with_eager(
            lambda: without_dropout(case.module(args.quick, device, seed=2)),
            case.inputs(args.quick, device, seed=3),
            ours.compile,
            dtype=case.dtype,
            device=device,
            train=train,
        )
    )


if __name__ == "__main__":
    main()
