"""What the groups share: their command line, a fresh start for each peer, and failures that become
notes."""

from __future__ import annotations

import argparse
import contextlib
import gc
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.caches import caches_in, fresh_caches
from benchmarks.peers import Peer
from benchmarks.table import Row, Table, geometric_mean, ratio
from benchmarks.timing import on_gpu
from tests.accuracy import Comparison


def parser(
    description: str | None, default_peers: str = ",".join(peers.DEFAULT_PEERS)
) -> argparse.ArgumentParser:
    """The options every group has."""
    found = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    add = found.add_argument
    add("--peers", default=default_peers, help=f"of {', '.join(peers.PEERS)}")
    add("--only", default="", help="comma-separated: rows whose name contains one of these")
    add(
        "--quick",
        action="store_true",
        help="small sizes, for a CPU; first calls may find caches filled",
    )
    add("--steps", type=int, default=30, help="repetitions of a timing at most (default 30)")
    add("--budget", type=float, default=3.0, help="seconds of one timing at most (default 3)")
    add(
        "--limit",
        type=float,
        default=460.0,
        help="seconds after which rows are skipped (default 460)",
    )
    add(
        "--no-check",
        dest="check",
        action="store_false",
        help="time without comparing to float64 first",
    )
    add(
        "--caches",
        metavar="FOLDER",
        help="keep caches there, for the next command: first calls then find what is in them",
    )
    add("--json", metavar="PATH", help="write every number there")
    return found


def wanted(name: str, only: str) -> bool:
    """True where ``only`` is empty or one of its comma-separated parts stands in ``name``."""
    return not only or any(part and part in name for part in only.split(","))


@dataclass
class Session:
    """One group's run: the table being filled, and the time spent."""

    args: argparse.Namespace
    table: Table
    started: float = field(default_factory=time.perf_counter)
    broken: str = ""

    @property
    def peers(self) -> tuple[Peer, ...]:
        return peers.chosen(self.args.peers)

    def attempt(self, row: Row, label: str, work: Callable[[], None]) -> None:
        """Run a peer's part of a row from a fresh start, caches empty; what it raises or warns of
        becomes the row's note.

        With the device broken by an earlier failure, or past the time limit, it is not run.
        """
        fresh()
        started = time.perf_counter()
        try:
            self._raise_if_over()
            with self._caches(), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                work()
            for warning in caught:
                if "iocompiler" in f"{warning.category.__module__} {warning.message}":
                    note(row, label, str(warning.message))
        except Exception as error:  # whatever a peer raises is its result
            note(row, label, f"{type(error).__name__}: {first_line(error)}")
            self.broken = self.broken or device_error()
        fresh()
        self.table.write(self.args.json)  # a group that is stopped keeps what it measured
        print(f"  {row['name']} {label}: {time.perf_counter() - started:.1f} s", flush=True)

    def _caches(self) -> contextlib.AbstractContextManager[Any]:
        if self.args.caches:
            return caches_in(Path(self.args.caches))
        # small sizes share one cache: on a CPU the C++ compiler is what takes long
        return contextlib.nullcontext() if self.args.quick else fresh_caches()

    @property
    def seconds_left(self) -> float:
        """Until the group's limit; negative past it."""
        return float(self.args.limit - (time.perf_counter() - self.started))

    def _raise_if_over(self) -> None:
        if self.broken:
            raise Skipped(f"the device failed before: {self.broken}")
        if self.seconds_left < 0:
            raise Skipped(f"past the group's {self.args.limit:.0f} s")


class Skipped(Exception):
    """A row that was not run."""


def note(row: Row, label: str, text: str) -> None:
    """Append to the row's note, each text once, shortened."""
    line = f"{label}: {text[:160]}"
    before = str(row.get("note") or "")
    if line not in before:
        row["note"] = f"{before}; {line}" if before else line


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return re.sub(r"0x[0-9a-f]+", "0x..", lines[0]) if lines else ""


def fresh() -> None:
    """Forget what Dynamo compiled and what tensors hold."""
    torch._dynamo.reset()
    gc.collect()
    if on_gpu():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def device_error() -> str:
    """What a CUDA context that no longer works says; "" where it works."""
    if not on_gpu():
        return ""
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except RuntimeError as error:
        return first_line(error)
    return ""


def verdict(comparisons: tuple[Comparison, ...]) -> str:
    """ "ok 0.31" (the largest error, in units of what is allowed), or the tensor that broke the
    rule."""
    if not comparisons:
        return "FAIL: nothing compared"
    worst = max(comparisons, key=lambda c: (not c.ok, c.compiled / c.allowed))
    bad = sum(not c.ok for c in comparisons)
    return (
        f"FAIL {bad} of {len(comparisons)}: {worst}"
        if bad
        else f"ok {worst.compiled / worst.allowed:.2f}"
    )


def add_ratio(row: Row, unit: str = "ms") -> None:
    """The column everyone looks for: our time over Inductor's."""
    row["ours/inductor"] = ratio(row.get(f"ours {unit}"), row.get(f"inductor {unit}"))


def add_best(row: Row) -> None:
    """Which peer is the fastest, and our time over its."""
    theirs = {name: ms for name, ms in times(row).items() if not name.startswith("ours")}
    if theirs:
        row["best peer"] = min(theirs, key=lambda name: theirs[name])
        row["ours/best"] = ratio(row.get("ours ms"), min(theirs.values()))


def times(row: Row) -> dict[str, float]:
    """The peers' times (ms) in a row, where they were measured."""
    found = {name: row.get(f"{name} ms") for name in peers.PEERS}
    return {name: float(ms) for name, ms in found.items() if isinstance(ms, (int, float))}


def add_geometric_mean(table: Table, of: str = "ours/inductor", only: str = "") -> None:
    """Of a column, over the rows whose name has ``only`` in it."""
    values = [row.get(of) for row in table.rows if only in str(row.get("name"))]
    measured = [v for v in values if v is not None]
    label = f" of {only}" if only else ""
    table.summary[f"geometric mean of {of}{label}"] = geometric_mean(measured)
    table.summary[f"rows with {of}{label}"] = f"{len(measured)} of {len(values)}"


def columns(names: tuple[Peer, ...], *units: str) -> list[str]:
    """ "eager ms", "inductor ms", ..., unit by unit."""
    return [f"{peer.name} {unit}" for unit in units for peer in names]
