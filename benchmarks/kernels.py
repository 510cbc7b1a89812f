"""Memory-bound kernels at 8192 x width, bf16: time, bytes/s of the compulsory bytes, share of the
copy bandwidth.

Compulsory bytes: every input read once, every output written once. The copy is that of 1 GiB on
this device in this run; "% same" compares with a copy moving as many bytes as the row does. Caches
are cold: a batch of calls walks over input sets larger than five times the L2, each call writes
memory of its own, and host time does not count.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.adamw import WIDTHS as ADAMW_WIDTHS
from benchmarks.adamw import AdamW
from benchmarks.harness import (
    Session,
    add_geometric_mean,
    add_ratio,
    columns,
    parser,
    verdict,
    wanted,
)
from benchmarks.kernel_zoo import KERNELS, Kernel
from benchmarks.peers import Peer, chosen
from benchmarks.table import Row, Table
from tests.accuracy import Comparison, Results, compare, named_outputs, run

WIDTHS = (768, 1024, 2048, 4096, 8192, 16384)
ROWS = 8192
_MAX_SETS = 24
Calls = Callable[[], Sequence[Callable[[], Any]]]


def main() -> None:
    args = arguments()
    peers = chosen(args.peers)
    shown = [
        "name",
        *columns(peers, "ms"),
        "ours/inductor",
        "ours GB/s",
        "ours % copy",
        "ours % same",
    ]
    shown += [*(["inductor % copy"] if "inductor" in args.peers else []), "check"]
    session = Session(args, Table("kernels, bf16", shown))
    copy = timing.copy_bandwidth(2**24 if args.quick else 2**30, args.quick)
    session.table.facts["copy GB/s"] = copy / 1e9
    rows, widths = (64, [256]) if args.quick else (ROWS, [int(w) for w in args.widths.split(",")])
    for kernel in KERNELS:
        for width in widths:
            if wanted(f"{kernel.name} {width}", args.only):
                _row(session, kernel, rows, width, copy)
    for width in widths:
        if wanted(f"adamw {width}", args.only) and (args.quick or width in ADAMW_WIDTHS):
            _adamw_row(session, AdamW(width, 10 if args.quick else 100), copy)
    add_geometric_mean(session.table)
    session.table.finish(args.json)


def arguments() -> argparse.Namespace:
    found = parser(__doc__, default_peers="inductor,ours")
    found.add_argument("--widths", default=",".join(map(str, WIDTHS)), help=f"default {WIDTHS}")
    found.set_defaults(budget=0.2, steps=60)
    return found.parse_args()


def _row(session: Session, kernel: Kernel, rows: int, width: int, copy: float) -> None:
    row: Row = {"name": f"{kernel.name} {rows}x{width}"}
    session.table.rows.append(row)
    for peer in session.peers:
        session.attempt(
            row, peer.name, partial(_measure, session, kernel, peer, row, rows, width, copy)
        )
    add_ratio(row)


def _measure(
    session: Session, kernel: Kernel, peer: Peer, row: Row, rows: int, width: int, copy: float
) -> None:
    device = timing.device()
    compiled = peer.compile(kernel.function)
    if session.args.check and peer.name == "ours":
        row["check"] = verdict(_check(kernel, compiled, rows, width, device))
    moved = _compulsory_bytes(kernel, rows, width, device)
    prepare = _calls(kernel, compiled, rows, width, device, moved)
    _fill(session, row, peer, prepare, moved, copy)


def _fill(session: Session, row: Row, peer: Peer, prepare: Calls, moved: int, copy: float) -> None:
    time = timing.batches(prepare, session.args.steps, session.args.budget)
    rate = moved / (time.ms * 1e-3)
    row["bytes"] = moved
    row[f"{peer.name} ms"], row[f"{peer.name} spread ms"] = time.ms, time.spread_ms
    row[f"{peer.name} GB/s"], row[f"{peer.name} % copy"] = rate / 1e9, 100 * rate / copy
    row[f"{peer.name} % same"] = 100 * rate / _copy_of(moved, session.args.quick)


@cache
def _copy_of(moved: int, quick: bool) -> float:
    return timing.copy_bandwidth(max(512, moved // 2), quick)


def _compulsory_bytes(kernel: Kernel, rows: int, width: int, device: str) -> int:
    """Forward: inputs and outputs. Backward: inputs, the outputs' gradients, and the inputs'
    gradients."""
    inputs = kernel.inputs(rows, width, device, torch.bfloat16, seed=0)
    outputs = named_outputs(kernel.function(**inputs)).values()
    differentiated = [t for t in inputs.values() if t.requires_grad]
    return sum(t.nbytes for t in [*inputs.values(), *outputs, *differentiated])


def _calls(
    kernel: Kernel, compiled: Callable[..., Any], rows: int, width: int, device: str, moved: int
) -> Calls:
    sets = min(_MAX_SETS, max(2, -(-5 * timing.l2_bytes() // moved)))
    inputs = [kernel.inputs(rows, width, device, torch.bfloat16, seed) for seed in range(sets)]
    if not kernel.backward:
        return lambda: [lambda given=given: compiled(**given) for given in inputs]

    def prepare() -> list[Callable[[], Any]]:
        return [_gradient(compiled(**given), list(given.values())) for given in inputs]

    return prepare


def _gradient(output: Tensor, inputs: list[Tensor]) -> Callable[[], Any]:
    leaves = [t for t in inputs if t.requires_grad]
    cotangent = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, leaves, cotangent)


def _check(
    kernel: Kernel, compiled: Callable[..., Any], rows: int, width: int, device: str
) -> tuple[Comparison, ...]:
    """On fresh inputs at the timed size; for what is random, the expected output under the mask
    seen."""
    inputs = kernel.inputs(rows, width, device, torch.bfloat16, seed=99)
    wide = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in inputs.items()}
    reference = run(kernel.function, nn.Module(), wide, kernel.backward)
    eager, ours = (_run(kernel, function, inputs) for function in (kernel.function, compiled))
    if kernel.replay is None:
        return compare(ours, eager, reference, torch.bfloat16)
    expected = [Results(kernel.replay(wide, r.values), {}) for r in (eager, ours)]
    by_eager = compare(eager, eager, expected[0], torch.bfloat16)
    by_ours = compare(ours, ours, expected[1], torch.bfloat16)
    return tuple(
        Comparison(e.name, e.eager, o.compiled, e.allowed)
        for e, o in zip(by_eager, by_ours, strict=True)
    )


def _run(kernel: Kernel, function: Callable[..., Any], inputs: dict[str, Tensor]) -> Results:
    copies = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in inputs.items()}
    return run(function, nn.Module(), copies, kernel.backward)


def _adamw_row(session: Session, adamw: AdamW, copy: float) -> None:
    row: Row = {"name": f"adamw {adamw.count} x {adamw.shape[0]}x{adamw.shape[1]}"}
    session.table.rows.append(row)
    for peer in session.peers:
        session.attempt(row, peer.name, partial(_measure_adamw, session, adamw, peer, row, copy))
    add_ratio(row)


def _measure_adamw(session: Session, adamw: AdamW, peer: Peer, row: Row, copy: float) -> None:
    device = timing.device()
    if session.args.check and peer.name == "ours":
        row["check"] = verdict(adamw.check(peer, device))
    step = peer.compile(adamw.optimizer(device, torch.bfloat16, seed=0).step)
    _fill(session, row, peer, lambda: [step] * 4, adamw.compulsory_bytes, copy)


if __name__ == "__main__":
    main()
