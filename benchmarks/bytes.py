"""Modeled bytes against measured DRAM bytes (ncu), kernel by kernel, over one training step
compiled by us.

What is measured, and how L2 is dealt with: ncu empties the caches before every kernel
(``--cache-control all``), so all a kernel reads comes from DRAM once and ``dram__bytes_read`` is
what it would read with nothing left over from the kernel before. What it writes may still lie dirty
in L2 when it ends, where ``dram__bytes_write`` has not seen it; these bytes are taken from what the
SMs sent to L2, at most the L2's size ("pending"). "measured" is read + written + pending; "dram" is
the strict sum without pending. In a real step a kernel may find inputs in L2: the model prices HBM
for a cold cache, and so do we.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import ncu, timing
from benchmarks.caches import variables
from benchmarks.harness import Session, parser, wanted
from benchmarks.model_zoo import MODELS
from benchmarks.models import training_step
from benchmarks.ncu import Launch
from benchmarks.table import Row, Table

WITHIN = 0.15
_SMALL = 2**20
_LIMIT_S = 230.0


def main() -> None:
    args = arguments()
    if args.child:
        return _child(args)
    shown = ["model", "graph", "name", "launches", "modeled MB", "measured MB", "dram MB", "off %"]
    session = Session(args, Table(f"bytes, attention {args.attention}, bf16, train step", shown))
    for model in MODELS:
        if wanted(model, args.only):
            row: Row = {"name": model, "model": model}
            session.attempt(row, "ncu", partial(_measure, session, model))
            if row.get("note"):
                session.table.rows.append(row)
    session.table.finish(args.json)
    return None


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--attention", default="eager", choices=["eager", "sdpa"])
    found.add_argument("--ncu", default="", help="path of ncu, where it is not on PATH")
    found.add_argument("--ncu-csv", default="", help="a folder that keeps plans and measurements")
    found.add_argument("--child", default="", help=argparse.SUPPRESS)
    found.add_argument("--plan", default="", help=argparse.SUPPRESS)
    found.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    found.set_defaults(only="bert,llama")
    return found.parse_args()


def _measure(session: Session, model: str) -> None:
    planned, launches = _profiled(session.args, model)
    if session.args.ncu_csv:
        _keep(session.args.ncu_csv, model, planned, launches)
    _fill(session.table, model, planned, launches)


def _profiled(args: argparse.Namespace, model: str) -> tuple[list[dict[str, Any]], list[Launch]]:
    """The planned kernels of one step, and what ncu measured (nothing without a GPU)."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        plan, log = Path(folder, "plan.json"), Path(folder, "ncu.csv")
        child = [sys.executable, "-m", "benchmarks.bytes", "--child", model, "--plan", str(plan)]
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


def _child(args: argparse.Namespace) -> None:
    """Compile, warm up, write the plan, and run one step between the profiler's start and stop."""
    from iocompiler import Compiler
    from iocompiler.cost_model.device import DEVICES, current_device
    from iocompiler.report.explain import explain, report_of

    model, on_gpu = MODELS[args.child], timing.on_gpu()
    device = "cuda" if on_gpu else "cpu"
    module = model.module(args.attention, args.quick, device).to(torch.bfloat16).train()
    inputs = model.inputs(args.quick, device, torch.bfloat16, seed=1)
    if on_gpu:
        records: list[Any] = []
        compiled = torch.compile(module, backend=Compiler(on_compiled=records.append, cache=False))
        step = training_step(module, compiled, inputs)
        for _ in range(2):
            step()
        if args.warm:
            return
        report = report_of(records, current_device(torch.device("cuda")), False, Counter())
    else:
        report = explain(
            module, device=DEVICES["h200"].name, training=True, compile_kernels=False, **inputs
        )
    kernels = [k for k in report.kernels if k.generated]
    Path(args.plan).write_text(
        json.dumps(
            [
                {"name": k.name, "graph": k.graph, "bytes": k.bytes, "bound": k.bound}
                for k in kernels
            ]
        )
    )
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
