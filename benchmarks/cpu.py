"""Ours beside Inductor on a CPU, at small sizes: never slower is the claim.

Both run Inductor's C++, ours after our rewrites. They are compiled in one process with one thread
and run in turns, so that what else the machine does meets both alike. Counted is the time the
process computes, not the time that passes; each of three repetitions takes the medians of its
turns, the table has the median repetition by its ratio, and the least and the greatest ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Session, add_geometric_mean, parser, wanted
from benchmarks.model_zoo import MODELS
from benchmarks.module_zoo import CASES
from benchmarks.peers import PEERS, Peer
from benchmarks.subjects import Step, model_step, module_step
from benchmarks.table import Row, Table

REPETITIONS = 3
PAIR = ("ours", "inductor")


def main() -> None:
    args = arguments()
    shown = ["name", "inductor ms", "ours ms", "ours/inductor", "least", "greatest", "turns"]
    session = Session(args, Table("ours beside Inductor on a CPU, one thread", shown))
    torch.set_num_threads(1)
    for name, make in subjects().items():
        if wanted(name, args.only):
            row: Row = {"name": name}
            session.table.rows.append(row)
            session.attempt(row, "both", partial(_measure, args, make, row))
    add_geometric_mean(session.table)
    session.table.finish(args.json)


def arguments() -> Any:
    found = parser(__doc__, default_peers=",".join(PAIR))
    found.set_defaults(quick=True, steps=200, limit=1200.0)
    args = found.parse_args()
    if torch.cuda.is_available():
        raise SystemExit("this group is for a machine without a GPU")
    return args


def subjects() -> dict[str, Callable[[str], Step]]:
    """Each row's step by the name of a peer: models trained and run, modules trained."""
    found: dict[str, Callable[[str], Step]] = {}

    def add(name: str, make: Callable[[Peer, bool], Step]) -> None:
        found[name] = lambda peer: make(PEERS[peer], True)

    for model in MODELS.values():
        for train in (True, False):
            phase = "train" if train else "forward"
            add(f"{model.name} {phase}", partial(model_step, model, train))
    for case in CASES:
        add(f"{case.name} step", partial(module_step, case))
    return found


def _measure(args: Any, make: Callable[[str], Step], row: Row) -> None:
    steps = {}
    for peer in PAIR:
        steps[peer] = make(peer)
        for _ in range(3):
            steps[peer]()
    once = sum(_seconds(step) for step in steps.values())
    turns = max(5, min(args.steps, int(args.budget / once)))
    found = [in_turns(steps, turns) for _ in range(REPETITIONS)]
    row |= middle(found) | {"turns": turns}


def in_turns(steps: dict[str, Step], turns: int) -> dict[str, float]:
    """Median milliseconds of each step; which of them is first changes from turn to turn."""
    samples: dict[str, list[float]] = {peer: [] for peer in steps}
    for turn in range(turns):
        for peer in sorted(steps, reverse=turn % 2 == 1):
            samples[peer].append(1e3 * _seconds(steps[peer]))
    return {peer: statistics.median(values) for peer, values in samples.items()}


def _seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def middle(repetitions: list[dict[str, float]]) -> Row:
    """The repetition whose ratio is the median, and how far the ratios lie apart."""
    ordered = sorted(repetitions, key=lambda times: times["ours"] / times["inductor"])
    ratios = [times["ours"] / times["inductor"] for times in ordered]
    at = len(ordered) // 2
    found: Row = {f"{peer} ms": ordered[at][peer] for peer in PAIR}
    return found | {"ours/inductor": ratios[at], "least": ratios[0], "greatest": ratios[-1]}


if __name__ == "__main__":
    main()
