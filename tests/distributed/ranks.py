"""Two processes, each running every case: what a case raises is its result.

On the CPU they meet by gloo; on GPUs, one each, by NCCL. No run hangs: a collective waits for at
most `PATIENCE`, all ranks together for at most their limit, and a rank that has died takes the
other one with it.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
PATIENCE = timedelta(seconds=120)
"""Of a collective for the other rank, which may be compiling."""
_GRACE = 10.0
"""Seconds a rank has to end after the other one has died."""
_DEATH = "the other rank died"
_WAITS, _BEGUN = "not begun", "cut off"

Case = Callable[[torch.device], None]


def run(
    cases: Mapping[str, Case], folder: Path, device: str = "cpu", limit: float = 600.0
) -> dict[str, list[str]]:
    """For each case one line a rank: "" where nothing was raised.

    Args:
        cases: functions that a new process can import, called with the rank's own device.
        folder: an empty one, for what the ranks leave.
        device: "cpu" or "cuda".
        limit: seconds until the ranks are killed.
    """
    context = mp.get_context("spawn")
    given = [(rank, dict(cases), str(folder), device) for rank in range(RANKS)]
    processes = [context.Process(target=_rank, args=each) for each in given]
    for process in processes:
        process.start()
    ends = _joined(processes, time.monotonic() + limit)
    ranks = [(_read(folder, rank), end) for rank, end in enumerate(ends)]
    return {name: [_said(found, name, end) for found, end in ranks] for name in cases}


def _said(found: Mapping[str, str], name: str, end: str) -> str:
    """What came of a case on a rank; where it did not finish, also how the rank ended."""
    outcome = found.get(name, _WAITS)
    return f"{outcome}; {end}" if outcome in (_WAITS, _BEGUN) else outcome


def _joined(processes: list[BaseProcess], deadline: float) -> list[str]:
    """Wait for all, kill those that still run when it is time; how each one ended."""
    reason = "the limit of time"
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes) and reason != _DEATH:
            reason, deadline = _DEATH, min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.05)
    running = [process.is_alive() for process in processes]
    for process in processes:  # all before one is waited for: the others would see it go
        process.kill()
    ends = []
    for process, alive in zip(processes, running, strict=True):
        process.join()
        ends.append(f"killed: {reason}" if alive else f"ended with exit code {process.exitcode}")
    return ends


def _read(folder: Path, rank: int) -> dict[str, str]:
    file = _file(folder, rank)
    found: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


def _rank(rank: int, cases: dict[str, Case], folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    os.environ["IOCOMPILER_CACHE_DIR"] = f"{folder}/cache"
    device = _meet(rank, folder, kind)
    found: dict[str, str] = {}
    for name, case in cases.items():
        _note(Path(folder), rank, found, name, _BEGUN)
        torch._dynamo.reset()
        _note(Path(folder), rank, found, name, _outcome(case, device))
    dist.destroy_process_group()


def _meet(rank: int, folder: str, kind: str) -> torch.device:
    """Join the other rank; the device that is this one's."""
    place = f"file://{folder}/meeting"
    if kind == "cpu":
        dist.init_process_group("gloo", place, PATIENCE, RANKS, rank)
        return torch.device("cpu")
    device = torch.device(kind, rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", place, PATIENCE, RANKS, rank, device_id=device)
    return device


def _outcome(case: Case, device: torch.device) -> str:
    try:
        case(device)
        if device.type == "cuda":
            torch.cuda.synchronize()  # what a kernel did wrong is this case's
    except Exception as error:
        return f"{error!r}\n{traceback.format_exc(limit=-5)}"
    return ""


def _note(folder: Path, rank: int, found: dict[str, str], name: str, outcome: str) -> None:
    """Written at once, and whole: the process may be killed at any time."""
    found[name] = outcome
    new = folder / f"{rank}.new"
    new.write_text(json.dumps(found))
    new.replace(_file(folder, rank))
