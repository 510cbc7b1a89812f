"""A linear head with cross-entropy, forward and backward: ours beside its peers and beside its
three matrix products alone by cuBLAS; distillation from another head beside its four.

``--chunks`` repeats ours for several sizes of the scratch. ``--part`` runs one of both alone. A row
is one peer on one shape: time, ours over it, it over the products, and peak GiB above inputs and
weights. The last lines have ours over the best peer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import linear_cross_entropy_peers as others
from benchmarks import peers, timing
from benchmarks.harness import Session, note, parser, verdict, wanted
from benchmarks.linear_cross_entropy_peers import Loss, running
from benchmarks.step import beside_best
from benchmarks.table import Row, Table, ratio
from iocompiler.ops import linear_cross_entropy_chunks as chunks
from tests.accuracy import compare_with_eager

SHAPES = ((8192, 2048, 128256), (8192, 768, 50257), (8192, 1024, 30522))
QUICK = ((512, 32, 4096),)
# rows, the student's width, classes, the teacher's width
DISTILLED, QUICK_DISTILLED = (8192, 2048, 32000, 2048), (64, 32, 512, 32)
TEMPERATURE = 2.0
SCRATCHES = (64, 128, 256, 512, 1024)  # MiB
COLUMNS = ("name", "peer", "ms", "ours/peer", "over products", "GiB", "check")


def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """What a user writes."""
    return F.cross_entropy(F.linear(x, weight).float(), target)


def distilled(x: Tensor, weight: Tensor, target: Tensor, taught: Tensor, teacher: Tensor) -> Tensor:
    """The same beside a divergence from the teacher's softmax of ``taught``."""
    student = F.linear(x, weight).float()
    with torch.no_grad():
        logits = F.linear(taught, teacher).float()
    soft = F.kl_div(
        F.log_softmax(student / TEMPERATURE, -1),
        F.softmax(logits / TEMPERATURE, -1),
        reduction="batchmean",
    )
    return 0.5 * F.cross_entropy(student, target) + 0.5 * TEMPERATURE**2 * soft


@dataclass(frozen=True)
class Problem:
    """A loss and what it is given: x [T, D], weight [V, D], target [T] and, where it is taught, the
    teacher's rows and weight; bfloat16."""

    name: str
    loss: Loss
    given: tuple[Tensor, ...]

    @property
    def target(self) -> Tensor:
        return self.given[2]

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk of ours."""
        rows, vocabulary = self.given[0].shape[0], self.given[1].shape[0]
        return chunks.chunk_rows(rows, vocabulary, 2, chunks.SCRATCH_BYTES)

    def clear(self) -> None:
        for tensor in self.given:
            tensor.grad = None

    def step(self, run: Loss) -> Callable[[], None]:
        """Forward and backward, gradients made anew."""

        def call() -> None:
            self.clear()
            run(*self.given).backward()  # type: ignore[no-untyped-call]

        return call

    def products(self) -> Callable[[], None]:
        """The three matrix products alone, the gradient of the logits being given; that of the
        teacher's rows and weight too.
        """
        x, weight = self.given[0].detach(), self.given[1].detach()
        teacher = self.given[3:]
        logits = x @ weight.t()

        def call() -> None:
            torch.mm(x, weight.t(), out=logits)
            logits @ weight
            logits.t() @ x
            for rows, other in zip(teacher[::2], teacher[1::2], strict=True):
                torch.mm(rows, other.t(), out=logits)

        return call


def problem(shape: tuple[int, ...], loss: Loss = loss) -> Problem:
    """Of rows, width, classes and, where it is taught, the teacher's width."""
    rows, width, vocabulary, *taught = shape
    torch.manual_seed(0)
    how: dict[str, Any] = {"device": timing.device(), "dtype": torch.bfloat16}
    x = torch.randn(rows, width, **how).requires_grad_()
    weight = (torch.randn(vocabulary, width, **how) / width**0.5).requires_grad_()
    target = torch.randint(0, vocabulary, (rows,), device=timing.device())
    teacher: list[Tensor] = []
    for other in taught:
        teacher += [torch.randn(rows, other, **how), torch.randn(vocabulary, other, **how)]
        teacher[1].div_(other**0.5)
    name = " x ".join(map(str, (rows, width, vocabulary)))
    name = f"distilled {name}, teacher {taught[0]}" if taught else name
    return Problem(name, loss, (x, weight, target, *teacher))


def main() -> None:
    args = arguments()
    session = Session(args, Table("linear head + cross-entropy, forward + backward", COLUMNS))
    both = others.chosen(args.peers)
    if args.part != "distilled":
        for shape in QUICK if args.quick else SHAPES:
            measure(session, problem(shape), both)
    if args.part != "plain":
        compiling = tuple(name for name in both if name in peers.PEERS)
        taught = QUICK_DISTILLED if args.quick else DISTILLED
        measure(session, problem(taught, distilled), compiling)
    session.table.finish(args.json)


def arguments() -> argparse.Namespace:
    found = parser(__doc__, default_peers=",".join(others.DEFAULT))
    found.add_argument("--part", choices=("plain", "distilled"), help="alone")
    found.add_argument(
        "--chunks",
        type=lambda text: tuple(int(size) for size in text.split(",")),
        nargs="?",
        const=SCRATCHES,
        default=(),
        metavar="MIB",
        help=f"ours with scratches of these sizes too (default {','.join(map(str, SCRATCHES))})",
    )
    found.set_defaults(steps=50)
    return found.parse_args()


def measure(session: Session, given: Problem, names: tuple[str, ...]) -> None:
    """The rows of one problem: its products, the peers, ours with other scratches."""
    args = session.args
    if not wanted(given.name, args.only):
        return
    first = len(session.table.rows)
    alone = _row(session, given, "products")
    session.attempt(alone, "products", partial(_products, args, given, alone))
    for name in names:
        row = _row(session, given, name)
        if args.check and name == "ours":
            session.attempt(row, "check", partial(_check, given, row))
        session.attempt(row, name, partial(_peer, args, given, name, row))
    for mib in args.chunks if "ours" in names else ():
        row = _row(session, given, f"ours, {mib} MiB")
        session.attempt(row, f"ours, {mib} MiB", partial(_scratch, args, given, mib, row))
    rows = session.table.rows[first:]
    ours = next((row.get("ms") for row in rows if row["peer"] == "ours"), None)
    for row in rows:
        row["over products"] = ratio(row.get("ms"), alone.get("ms"))
        row["ours/peer"] = ratio(ours, row.get("ms"))
    times: Row = {f"{row['peer']} ms": row.get("ms") for row in rows if row is not alone}
    for key, value in beside_best([{"name": "step", **times}]).items():
        session.table.summary[f"{given.name}: {key}"] = value


def _row(session: Session, given: Problem, peer: str) -> Row:
    row: Row = {"name": given.name, "peer": peer}
    session.table.rows.append(row)
    return row


def _products(args: argparse.Namespace, given: Problem, row: Row) -> None:
    _time(args, given.products(), row)


def _peer(args: argparse.Namespace, given: Problem, name: str, row: Row) -> None:
    before = others.chunked()
    with running(name, given.loss, given.chunk_rows) as run:
        call = given.step(run)
        timing.first_call(call)
        given.clear()
        with timing.PeakMemory() as peak:
            call()
        row["GiB"] = peak.gib
        _time(args, call, row)
    given.clear()
    if name == others.CHUNKER and before is not None and others.chunked() == before:
        note(row, name, "nothing was chunked")


def _scratch(args: argparse.Namespace, given: Problem, mib: int, row: Row) -> None:
    with scratch(mib << 20):
        note(row, f"{mib} MiB", f"{given.chunk_rows} rows a chunk")
        _peer(args, given, "ours", row)


@contextmanager
def scratch(size: int) -> Iterator[None]:
    """Chunks of ours take so many bytes."""
    before, chunks.SCRATCH_BYTES = chunks.SCRATCH_BYTES, size
    try:
        yield
    finally:
        chunks.SCRATCH_BYTES = before


def _time(args: argparse.Namespace, call: Callable[[], None], row: Row) -> None:
    time = timing.steps(call, args.steps, args.budget)
    row["ms"], row["spread ms"] = time.ms, time.spread_ms


class _Head(nn.Module):
    def __init__(self, given: Problem) -> None:
        super().__init__()
        self.weight = nn.Parameter(given.given[1].detach().clone())
        self.loss = given.loss

    def forward(self, x: Tensor, target: Tensor, **teacher: Tensor) -> Tensor:
        return self.loss(x, self.weight, target, **teacher)


def _check(given: Problem, row: Row) -> None:
    x, _, target, *teacher = given.given
    taught = dict(zip(("taught", "teacher"), teacher, strict=False))
    row["check"] = verdict(
        compare_with_eager(
            partial(_Head, given),
            {"x": x, "target": target, **taught},
            peers.PEERS["ours"].compile,
            dtype=torch.bfloat16,
            device=timing.device(),
        )
    )


if __name__ == "__main__":
    main()
