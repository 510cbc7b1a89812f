"""Modeled bytes against measured DRAM bytes (ncu), kernel by kernel, over one training step
compiled by us; with ``--peers inductor,ours`` also those of the whole step by Inductor.

What is measured, and how L2 is dealt with: ncu empties the caches before every kernel
(``--cache-control all``), so all a kernel reads comes from DRAM once and ``dram__bytes_read`` is
what it would read with nothing left over from the kernel before. What it writes may still lie dirty
in L2 when it ends, where ``dram__bytes_write`` has not seen it; these bytes are taken from what the
SMs sent to L2, at most the L2's size ("pending"). "measured" is read + written + pending; "dram" is
the strict sum without pending. In a real step a kernel may find inputs in L2: the model prices HBM
for a cold cache, and so do we. A whole step is the sum over all its launches, library calls
included; for Inductor, "counted" is its own count of what its kernels and calls read and write.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import ncu, timing
from benchmarks.bytes_step import STEPS
from benchmarks.caches import variables
from benchmarks.harness import Session, parser, wanted
from benchmarks.ncu import Launch
from benchmarks.table import Row, Table, ratio

WITHIN = 0.15
_SMALL = 2**20
_LIMIT_S = 230.0
SAID = {"ours": "modeled", "inductor": "counted"}

Said = dict[str, Any]


def main() -> None:
    args = arguments()
    shown = ["model", "graph", "name", "launches", "modeled MB", "measured MB", "dram MB", "off %"]
    session = Session(args, Table(f"bytes, attention {args.attention}, bf16, train step", shown))
    for name in STEPS:
        if wanted(name, args.only):
            row: Row = {"name": name, "model": name}
            for peer in session.peers:
                session.attempt(row, peer.name, partial(_measure, session, name, peer.name))
            _add_whole(session.table, name)
            if row.get("note"):
                session.table.rows.append(row)
    session.table.finish(args.json)


def arguments() -> argparse.Namespace:
    found = parser(__doc__, default_peers="ours")
    found.add_argument("--attention", default="eager", choices=["eager", "sdpa"])
    found.add_argument("--ncu", default="", help="path of ncu, where it is not on PATH")
    found.add_argument("--ncu-csv", default="", help="a folder that keeps plans and measurements")
    found.set_defaults(only="bert,llama,encoder")
    return found.parse_args()


def _measure(session: Session, name: str, peer: str) -> None:
    said, launches = _profiled(session.args, name, peer)
    if session.args.ncu_csv:
        _keep(session.args.ncu_csv, f"{name}_{peer}".replace(" ", "_"), said["kernels"], launches)
    if peer == "ours":
        _fill(session.table, name, said["kernels"], launches)
    whole = session.table.summary
    whole[f"{name}: whole step, {peer}, {SAID[peer]} MB"] = said["bytes"] / 1e6
    if launches:
        whole[f"{name}: whole step, {peer}, measured MB"] = sum(x.measured for x in launches) / 1e6


def _add_whole(table: Table, name: str) -> None:
    """Ours over Inductor's: by what the two compilers say, and by ncu."""
    for label, theirs in (("measured", "measured"), (SAID["ours"], SAID["inductor"])):
        mine = table.summary.get(f"{name}: whole step, ours, {label} MB")
        other = table.summary.get(f"{name}: whole step, inductor, {theirs} MB")
        if (share := ratio(mine, other)) is not None:
            labels = label if label == theirs else f"{label} / {theirs}"
            table.summary[f"{name}: whole step, ours / inductor, {labels}"] = share


def _profiled(args: argparse.Namespace, name: str, peer: str) -> tuple[Said, list[Launch]]:
    """What the compiler says of one step, and what ncu measured (nothing without a GPU)."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        plan, log = Path(folder, "plan.json"), Path(folder, "ncu.csv")
        child = [sys.executable, "-m", "benchmarks.bytes_step", name, peer, "--plan", str(plan)]
        child += ["--attention", args.attention, *(["--quick"] if args.quick else [])]
        environment = {**os.environ, **variables(Path(folder))}
        command = child
        if timing.on_gpu() and not args.quick:
            # once without ncu, which slows compilers down: the kernels then come from the cache
            warm = [*child, "--warm"]
            subprocess.run(warm, env=environment, capture_output=True, timeout=_LIMIT_S, check=True)
            command = [*ncu.command(args.ncu, log), *child]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
        if not plan.exists():
            raise RuntimeError(
                (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            )
        launches = ncu.parse(log.read_text()) if log.exists() else []
        if log.exists() and not launches:
            raise RuntimeError(f"ncu measured nothing: {log.read_text().strip()[-200:]}")
        return json.loads(plan.read_text()), launches


def _keep(
    folder: str, model: str, planned: list[dict[str, Any]], launches: Sequence[Launch]
) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps({"planned": planned, "measured": [vars(x) for x in launches]}, indent=1)
    Path(folder, f"bytes_{model}.json").write_text(text)


def _fill(
    table: Table, model: str, planned: list[dict[str, Any]], launches: Sequence[Launch]
) -> None:
    """One row a generated kernel; launches are matched in the order in which they run."""
    names = {kernel["name"] for kernel in planned}
    mine = [launch for launch in launches if ncu.is_named(launch.name, names)]
    if launches and len(mine) != len(planned):
        table.summary[f"{model}: matched by name"] = f"{len(mine)} launches, {len(planned)} planned"
    pairs = ncu.matched(planned, mine)
    rows = [_row(model, kernel, launch) for kernel, launch in pairs]
    table.rows += _merged(rows)
    table.summary[f"{model}: generated kernels"] = len(planned)
    table.summary[f"{model}: all launches"] = len(launches)
    for label, chosen in (
        ("all", rows),
        (">= 1 MiB", [r for r in rows if _number(r, "bytes") >= _SMALL]),
    ):
        off = [_number(r, "off %") for r in chosen if r.get("off %") is not None]
        if off:
            share = 100 * sum(abs(x) <= 100 * WITHIN for x in off) / len(off)
            table.summary[f"{model}: % of {len(off)} kernels ({label}) within {WITHIN:.0%}"] = share
    total = sum(_number(r, "measured MB") for r in rows)
    if total:
        table.summary[f"{model}: modeled / measured, summed"] = (
            sum(_number(r, "modeled MB") for r in rows) / total
        )


def _row(model: str, kernel: dict[str, Any], launch: Launch | None) -> Row:
    row: Row = {"model": model, "graph": kernel["graph"], "name": kernel["name"], "launches": 1}
    row["bytes"], row["modeled MB"] = kernel["bytes"], kernel["bytes"] / 1e6
    if launch is not None:
        row["measured MB"], row["dram MB"] = launch.measured / 1e6, launch.dram / 1e6
        row["us"] = launch.nanoseconds / 1e3
        row["off %"] = 100 * (kernel["bytes"] / launch.measured - 1) if launch.measured else None
    return row


def _merged(rows: Sequence[Row]) -> list[Row]:
    """Kernels of equal name and bytes as one row with the median launch's numbers, largest
    first."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        stem = str(row["name"]).rstrip("0123456789").rstrip("_")
        groups.setdefault((stem, row["graph"], row["bytes"]), []).append(row)
    found = []
    for group in groups.values():
        middle = sorted(group, key=lambda r: _number(r, "measured MB"))[len(group) // 2]
        found.append({**middle, "launches": len(group)})
    return sorted(found, key=lambda r: -_number(r, "bytes") * _number(r, "launches"))


def _number(row: Row, key: str) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) else 0.0


if __name__ == "__main__":
    main()
