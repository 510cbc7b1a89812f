"""Memory for time: a GPT's training step under several budgets, its peak as planned and as
allocated.

The peak is what stands above parameters and inputs at once: planned by walking the plans
(``Compilation.trade``), measured as ``torch.cuda.max_memory_allocated`` less what was allocated
before the step. A budget is a fraction of the peak without one. Gradients are held against those
of the row without a budget. Eager and Inductor stand beside as they are. Without a GPU nothing is
run: the step is planned for an H200.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.harness import Session, parser, wanted
from benchmarks.peers import Peer
from benchmarks.plans import error
from benchmarks.table import Row, Table
from iocompiler import Compiler, explain
from iocompiler.recompute.trade import Point, Trade
from tests.models.gpt import GPT

BUDGETS = (None, 1.0, 0.7, 0.5, 0.35)


@dataclass(frozen=True)
class Sizes:
    vocabulary: int
    width: int
    heads: int
    layers: int
    length: int
    batch: int

    def model(self, device: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        """A GPT in bf16 and a batch of tokens and targets, the same at each call."""
        torch.manual_seed(0)
        model = GPT(self.vocabulary, self.width, self.heads, self.layers, self.length)
        tokens = torch.randint(self.vocabulary, (2, self.batch, self.length))
        first, second = tokens.to(device)
        return model.to(device, torch.bfloat16), (first, second)


FULL = Sizes(vocabulary=50257, width=768, heads=12, layers=6, length=1024, batch=8)
QUICK = Sizes(vocabulary=256, width=64, heads=4, layers=2, length=64, batch=2)


def main() -> None:
    args = parser(__doc__).parse_args()
    sizes = QUICK if args.quick else FULL
    shown = ["name", "way", "allowed MB", "planned MB", "measured MB", "off %"]
    shown += ["modeled us", "measured us", "made again", "check"]
    title = f"memory budgets, GPT {sizes.layers} x {sizes.width}, train step, bf16"
    session = Session(args, Table(title, shown))
    gradients: list[Tensor] = []
    for peer in session.peers:
        if peer.name == "ours":
            _ours(session, sizes, gradients)
        elif timing.on_gpu() and wanted(peer.name, args.only):
            row: Row = {"name": peer.name}
            session.table.rows.append(row)
            session.attempt(row, peer.name, partial(_peer, session, sizes, peer, row))
    session.table.finish(args.json)


def _ours(session: Session, sizes: Sizes, gradients: list[Tensor]) -> None:
    rows: list[Row] = []
    trades: list[Trade] = []
    for budget in BUDGETS:
        name = f"ours, {'no budget' if budget is None else f'budget {budget:g}'}"
        if wanted(name, session.args.only):
            rows.append({"name": name})
            session.table.rows.append(rows[-1])
            step = partial(_budget, session, sizes, budget, rows[-1], trades, gradients)
            session.attempt(rows[-1], name, step)
    if trades and rows[0]["name"] == "ours, no budget":
        add_point(rows[0], trades[0].unconstrained)


def _budget(
    session: Session,
    sizes: Sizes,
    budget: float | None,
    row: Row,
    trades: list[Trade],
    gradients: list[Tensor],
) -> None:
    if timing.on_gpu():
        records: list[Any] = []
        backend = Compiler(on_compiled=records.append, cache=False, memory_budget=budget)
        found = _run(session, sizes, partial(torch.compile, backend=backend), row)
        gradients[:] = gradients or found
        worst = error(found, gradients)
        row["check"] = f"{'ok' if worst <= 1 else 'FAIL'} {worst:.2f}"
        trade = records[0].trade
    else:
        model, batch = sizes.model("cpu")
        settings: dict[str, Any] = {"device": "h200", "compile_kernels": False}
        report = explain(model, *batch, training=True, memory_budget=budget, **settings)
        trade = report.trades[0] if report.trades else None
    if trade is not None:
        trades.append(trade)
        row["allowed MB"], row["made again"] = trade.allowed / 1e6, len(trade.again)
        add_point(row, trade.chosen)


def _peer(session: Session, sizes: Sizes, peer: Peer, row: Row) -> None:
    _run(session, sizes, peer.compile, row)


def _run(session: Session, sizes: Sizes, compile_: Callable[[Any], Any], row: Row) -> list[Tensor]:
    """Measures a step's peak and time; returns the loss and the gradients."""
    model, batch = sizes.model("cuda")
    function = compile_(model)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss: Tensor = function(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    loss, _ = timing.first_call(step)  # libraries have their workspaces from here on
    found = [loss, *(p.grad for p in model.parameters())]
    model.zero_grad(set_to_none=True)
    with timing.PeakMemory() as peak:
        step()
    row["measured MB"] = None if peak.gib is None else peak.gib * 2**30 / 1e6
    model.zero_grad(set_to_none=True)
    row["measured us"] = 1e3 * timing.steps(step, session.args.steps, session.args.budget).ms
    return found


def add_point(row: Row, point: Point) -> None:
    """What was planned, and how far off the measured peak it is."""
    row["way"], row["planned MB"] = point.name, point.peak / 1e6
    row["modeled us"] = point.time_us
    measured = row.get("measured MB")
    if isinstance(measured, float) and measured:
        row["off %"] = 100 * (point.peak / 1e6 / measured - 1)


if __name__ == "__main__":
    main()
