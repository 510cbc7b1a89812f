"""Two processes with gloo on the CPU, each running every case: what a case raises is its result."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


def run(cases: Mapping[str, Callable[[], None]], folder: Path) -> dict[str, list[str]]:
    """For each case one line a rank: "" where nothing was raised."""
    mp.spawn(_rank, (dict(cases), str(folder)), nprocs=RANKS)
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
    return {name: [each[name] for each in found] for name in cases}


def _rank(rank: int, cases: dict[str, Callable[[], None]], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["IOCOMPILER_CACHE_DIR"] = f"{folder}/cache"
    dist.init_process_group("gloo", f"file://{folder}/meeting", timedelta(seconds=60), RANKS, rank)
    found = {}
    for name, case in cases.items():
        torch._dynamo.reset()
        try:
            case()
            found[name] = ""
        except Exception as error:
            found[name] = f"{error!r}\n{traceback.format_exc(limit=-5)}"
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
