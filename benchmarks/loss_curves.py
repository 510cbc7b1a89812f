"""Loss curves: a small GPT trained on Shakespeare's sonnets, ours beside eager with the same seed
and eager with other seeds.

A seed decides weights and batches; there is no dropout, so that two runs of one seed differ in
their rounding alone. Characters are tokens, the optimizer is AdamW. "autocast" has float32 weights
and bf16 autocast, "weights" bf16 weights and moments; with "+ AdamW" the optimizer's step is
compiled by us too. The rule, stated before anything was measured, on the means of a tenth of the
steps each:

- *within the spread*: in every tenth, ours is no further from eager with the same seed than the
  runs of eager, that one and the other seeds', are from each other (the highest less the lowest);
- *no drift*: over the second half of the steps, ours less eager with the same seed is in the mean
  at most half that spread of the second half, and a line through the ten differences rises by no
  more than that from the first tenth to the last.

A row is a way to train; the tenths stand below the table.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.harness import Session, parser, wanted
from benchmarks.peers import PEERS, Peer
from benchmarks.table import Row, Table, shown
from tests.models.gpt import GPT

TEXT = Path(__file__).parent / "data" / "sonnets.txt"
TENTHS = 10
Curve = list[float]


@dataclass(frozen=True)
class Training:
    """Sizes of the model and of a batch, steps and learning rate."""

    width: int
    heads: int
    layers: int
    length: int
    batch: int
    steps: int
    rate: float


FULL = Training(width=384, heads=6, layers=6, length=256, batch=32, steps=300, rate=1e-3)
QUICK = Training(width=64, heads=4, layers=2, length=64, batch=8, steps=300, rate=3e-3)


@dataclass(frozen=True)
class Variant:
    """How a model is trained: under autocast or in bf16, its optimizer compiled or not."""

    name: str
    autocast: bool
    compiled_step: bool

    def cast(self, device: str) -> AbstractContextManager[object]:
        return torch.autocast(device, torch.bfloat16) if self.autocast else nullcontext()


VARIANTS = (
    Variant("autocast", autocast=True, compiled_step=False),
    Variant("autocast + AdamW", autocast=True, compiled_step=True),
    Variant("weights", autocast=False, compiled_step=False),
    Variant("weights + AdamW", autocast=False, compiled_step=True),
)


def main() -> None:
    found = parser(__doc__, default_peers="eager,ours")
    found.add_argument("--seeds", type=int, default=4, help="other seeds of eager (default 4)")
    args = found.parse_args()
    training = QUICK if args.quick else FULL
    columns = ["name", "eager last", "ours last", "other seeds last", "furthest", "at step"]
    columns += ["drift", "rise", "allowed", "within the spread", "no drift"]
    title = f"loss curves, GPT {training.layers} x {training.width}, {training.steps} steps, bf16"
    session = Session(args, Table(title, columns))
    eager: dict[bool, list[Curve]] = {}
    for variant in VARIANTS:
        if wanted(variant.name, args.only):
            _variant(session, training, variant, eager.setdefault(variant.autocast, []))
    session.table.finish(args.json)


def _variant(session: Session, training: Training, variant: Variant, eager: list[Curve]) -> None:
    """Fills ``eager`` (seed 0, then the others) where it is empty: variants share it."""
    row: Row = {"name": variant.name}
    session.table.rows.append(row)
    runs = session.args.seeds + 1
    peer = PEERS["ours"]
    ours: list[Curve] = []

    def run_eager() -> None:
        eager.extend(train(training, variant, PEERS["eager"], seed) for seed in range(runs))

    if not eager:
        session.attempt(row, "eager", run_eager)
    session.attempt(row, "ours", lambda: ours.append(train(training, variant, peer, seed=0)))
    if ours and len(eager) == runs:
        row |= compared(ours[0], eager[0], eager[1:])
        for label in ("ours - eager", "spread"):
            values = ", ".join(shown(row[f"{label} {n}"]) for n in range(1, TENTHS + 1))
            session.table.summary[f"{variant.name}: {label}, by tenths"] = values


def train(training: Training, variant: Variant, peer: Peer, seed: int) -> Curve:
    """The loss of each step. Weights and batches depend on the seed alone, not on the peer."""
    device = timing.device()
    tokens, vocabulary = characters(TEXT.read_text())
    torch.manual_seed(seed)
    model = GPT(vocabulary, training.width, training.heads, training.layers, training.length)
    model.to(device, torch.float32 if variant.autocast else torch.bfloat16)
    batches = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.rate, foreach=True, capturable=device == "cuda"
    )
    function = peer.compile(model)
    compiled = variant.compiled_step and peer.backend is not None
    update: Callable[[], object] = peer.compile(optimizer.step) if compiled else optimizer.step
    losses = []
    for _ in range(training.steps):
        inputs = [part.to(device) for part in drawn(tokens, training, batches)]
        with variant.cast(device):
            loss = function(*inputs)
        loss.backward()
        update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    curve: Curve = torch.stack(losses).float().tolist()
    return curve


def characters(text: str) -> tuple[Tensor, int]:
    """The text as int64 numbers of its characters, and how many different ones there are."""
    known = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([known[character] for character in text]), len(known)


def drawn(tokens: Tensor, training: Training, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of stretches of the text and, for each character, the one that follows."""
    last = len(tokens) - training.length - 1
    starts = torch.randint(last + 1, (training.batch, 1), generator=generator)
    at = starts + torch.arange(training.length)
    return tokens[at], tokens[at + 1]


def tenths(curve: Sequence[float]) -> list[float]:
    """The mean of each tenth of a curve; its length is a multiple of ten."""
    if not curve or len(curve) % TENTHS:
        raise ValueError(f"{len(curve)} steps cannot be cut into {TENTHS} equal parts")
    size = len(curve) // TENTHS
    return [statistics.fmean(curve[i * size : (i + 1) * size]) for i in range(TENTHS)]


def compared(ours: Curve, eager: Curve, others: Sequence[Curve]) -> Row:
    """What the row says of the three, with both verdicts by the rule above.

    Args:
        eager: with the seed of ours.
        others: eager with other seeds; at least one.
    """
    runs = [tenths(curve) for curve in (eager, *others)]
    mine = tenths(ours)
    differences = [a - b for a, b in zip(mine, runs[0], strict=True)]
    spreads = [max(losses) - min(losses) for losses in zip(*runs, strict=True)]
    half = TENTHS // 2
    late = [statistics.fmean(run[half:]) for run in runs]
    allowed = (max(late) - min(late)) / 2
    drift, rise = statistics.fmean(differences[half:]), _slope(differences) * (TENTHS - 1)
    apart = [abs(a - b) for a, b in zip(ours, eager, strict=True)]
    finite = all(map(math.isfinite, (*ours, *eager)))
    within = all(abs(d) <= s for d, s in zip(differences, spreads, strict=True))
    steady = max(abs(drift), abs(rise)) <= allowed
    row: Row = {
        "eager last": eager[-1],
        "ours last": ours[-1],
        "other seeds last": ", ".join(shown(curve[-1]) for curve in others),
        "furthest": max(apart),
        "at step": apart.index(max(apart)) + 1,
        "drift": drift,
        "rise": rise,
        "allowed": allowed,
        "within the spread": "yes" if finite and within else "NO",
        "no drift": "yes" if finite and steady else "NO",
    }
    series = {"eager": runs[0], "ours": mine, "ours - eager": differences, "spread": spreads}
    for label, values in series.items():
        row |= {f"{label} {number}": value for number, value in enumerate(values, 1)}
    return row


def _slope(values: Sequence[float]) -> float:
    """Of the line through equidistant values, by least squares."""
    return statistics.linear_regression(range(len(values)), values).slope


if __name__ == "__main__":
    main()
