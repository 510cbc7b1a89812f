"""Whole models: a training step and a forward of BERT, GPT-2, Llama and ViT, peers side by side.

"train" sets gradients to None, runs forward with labels, and backward; "forward" is ``.eval()``
under no_grad, the same call; "step" is "train" and AdamW's update, once with ``fused=True``, once
compiled by each peer. Weights are random bf16, dropout as the config has it (off in the comparison
with float64, which comes first; updates are compared in `benchmarks.kernels`). ``--setup`` has them
as users train otherwise (`benchmarks/setups.py`), with no comparison.
"""

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
    note,
    parser,
    verdict,
    wanted,
)
from benchmarks.model_zoo import MODELS, Model, without_dropout
from benchmarks.peers import Peer, chosen
from benchmarks.setups import SETUPS, checkpointed, dtype_of, entered, prepared
from benchmarks.step import UPDATES, beside_best, update, whole_step
from benchmarks.table import Row, Table
from tests.accuracy import compare_with_eager

PHASES = ("train", "forward")
LOSS_DRIFT = 0.05


def main() -> None:
    args = arguments()
    peers = chosen(args.peers)
    shown = ["name", *columns(peers, "ms"), "ours/inductor", "ours/best"]
    shown += columns(peers, "device ms", "GiB")
    shown += [*columns(tuple(p for p in peers if p.backend), "first s"), "check"]
    title = f"models, attention {args.attention}, {args.setup}"
    session = Session(args, Table(title, shown))
    for model in MODELS.values():
        for phase in phases(args):
            if wanted(f"{model.name} {phase}", args.only):
                _row(session, model, phase)
        _beside_best(session.table, model)
    add_geometric_mean(session.table)
    for phase in phases(args):
        add_geometric_mean(session.table, "ours/best", only=phase)
    session.table.finish(args.json)


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument(
        "--attention", default="eager", choices=["eager", "sdpa"], help="eager: written plainly"
    )
    found.add_argument("--setup", default=SETUPS[0], choices=SETUPS)
    found.add_argument("--phase", default="", help="of train, forward (both by default), step")
    return found.parse_args()


def phases(args: argparse.Namespace) -> tuple[str, ...]:
    """Both, unless told; small sizes only the one with gradients. A "step" is one a kind of
    update."""
    if not args.phase:
        return ("train",) if args.quick else PHASES
    steps = [f"step, {kind}" for kind in UPDATES]
    return tuple(p for name in args.phase.split(",") for p in (steps if name == "step" else [name]))


def _beside_best(table: Table, model: Model) -> None:
    start = f"{model.name} step, "
    rows = [
        {**row, "name": str(row["name"]).removeprefix(start)}
        for row in table.rows
        if str(row["name"]).startswith(start)
    ]
    table.summary |= {
        f"{model.name} step: {key}": value for key, value in beside_best(rows).items()
    }


def _row(session: Session, model: Model, phase: str) -> None:
    row: Row = {"name": f"{model.name} {phase}"}
    session.table.rows.append(row)
    ours = next((p for p in session.peers if p.name == "ours"), None)
    kind = phase.partition(", ")[2]
    compared = session.args.check and session.args.setup == SETUPS[0]
    if compared and ours is not None and not kind:
        session.attempt(
            row, "check", partial(_check, session.args, model, phase == "train", ours, row)
        )
    for peer in session.peers:
        if peer.backend is None and kind == "compiled AdamW":
            continue
        measure = partial(_measure, session.args, model, phase, peer, row)
        session.attempt(row, peer.name, measure)
    losses = [row.get("ours loss"), row.get("eager loss")]
    if None not in losses and not abs(losses[0] / losses[1] - 1) < LOSS_DRIFT:  # type: ignore[operator]
        note(row, "ours", f"loss {losses[0]} where eager has {losses[1]}")
    add_ratio(row)
    add_best(row)


def _measure(args: argparse.Namespace, model: Model, phase: str, peer: Peer, row: Row) -> None:
    device = timing.device()
    train = phase != "forward"
    written = model.module(peer.attention or args.attention, args.quick, device)
    module = prepared(args.setup, written).train(train)
    inputs = model.inputs(args.quick, device, dtype_of(args.setup), seed=1)
    function = entered(args.setup, peer.compile(module), device)
    step = training_step(module, function, inputs) if train else forward(function, inputs)
    if kind := phase.partition(", ")[2]:
        step = whole_step(step, update(module, peer, kind))
    loss, row[f"{peer.name} first s"] = timing.first_call(step)
    row[f"{peer.name} loss"] = float(loss)
    del loss
    module.zero_grad(set_to_none=True)
    with timing.PeakMemory() as peak:
        step()
        module.zero_grad(set_to_none=True)
    row[f"{peer.name} GiB"] = peak.gib
    time = timing.steps(step, args.steps, args.budget)
    row[f"{peer.name} ms"], row[f"{peer.name} spread ms"] = time.ms, time.spread_ms
    queued = timing.steps(step, args.steps, args.budget, queued=True)
    row[f"{peer.name} device ms"] = queued.ms


def training_step(
    module: nn.Module, function: Callable[..., Any], inputs: dict[str, Tensor]
) -> Callable[[], Tensor]:
    """Gradients to None, forward with labels, backward; returns the loss."""

    def step() -> Tensor:
        module.zero_grad(set_to_none=True)
        loss: Tensor = function(**inputs)["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def forward(function: Callable[..., Any], inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The same call without gradients."""

    @torch.no_grad()
    def step() -> Tensor:
        loss: Tensor = function(**inputs)["loss"]
        return loss

    return step


def _check(args: argparse.Namespace, model: Model, train: bool, ours: Peer, row: Row) -> None:
    """Loss, logits and every gradient at the timed size against float64, dropout off."""
    device = timing.device()

    def build() -> nn.Module:
        return without_dropout(model.module(args.attention, args.quick, device, seed=2))

    inputs = model.inputs(args.quick, device, torch.float32, seed=3)
    row["check"] = verdict(
        compare_with_eager(
            build,
            inputs,
            ours.compile,
            dtype=torch.bfloat16,
            device=device,
            train=train,
            widen=_wide_and_checkpointed if train else nn.Module.double,
        )
    )


def _wide_and_checkpointed(module: nn.Module) -> nn.Module:
    """float64 attention at full size fits only a layer at a time."""
    return checkpointed(module.double())


if __name__ == "__main__":
    main()
