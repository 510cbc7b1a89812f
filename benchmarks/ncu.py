"""Running Nsight Compute over a command, and reading what it says."""

from __future__ import annotations

import csv
import re
import shutil
from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import l2_bytes

_READ, _WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
_TO_L2, _TIME = "lts__t_sectors_srcunit_tex_op_write.sum", "gpu__time_duration.sum"
_SECTOR = 32


@dataclass(frozen=True)
class Launch:
    """One kernel launch: bytes from and to DRAM, bytes the SMs wrote to L2, and its time."""

    name: str
    read: float
    written: float
    to_l2: float
    nanoseconds: float
    cache: int = 0  # bytes of L2

    @property
    def dram(self) -> float:
        return self.read + self.written

    @property
    def measured(self) -> float:
        """DRAM bytes, and what was written but still in L2 when the kernel ended."""
        pending = min(max(0.0, self.to_l2 - self.written), self.cache)
        return self.dram + pending


def command(path: str, log: Path) -> list[str]:
    """What to put before a command; it is profiled only between the profiler API's start and stop.

    Raises:
        FileNotFoundError: no ncu on PATH, in /usr/local/cuda, or at ``path``.
    """
    usual = Path("/usr/local/cuda/bin/ncu")
    found = path or shutil.which("ncu") or (str(usual) if usual.exists() else None)
    if found is None:
        raise FileNotFoundError("ncu (Nsight Compute) is not on PATH; name it with --ncu")
    options = (
        "--csv --page raw --print-units base --print-kernel-base function --clock-control none "
    )
    options += "--cache-control all --profile-from-start off --target-processes all"
    metrics = ",".join((_READ, _WRITTEN, _TO_L2, _TIME))
    return [found, *options.split(), "--log-file", str(log), "--metrics", metrics]


def parse(text: str) -> list[Launch]:
    """Launches of a raw CSV page in order; lines before its header and the row of units are passed
    over."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    rows = csv.DictReader(line for line in lines[start:] if line.startswith('"'))
    cache = l2_bytes()
    return [
        Launch(
            row["Kernel Name"],
            _number(row, _READ),
            _number(row, _WRITTEN),
            _number(row, _TO_L2) * _SECTOR,
            _number(row, _TIME),
            cache,
        )
        for row in rows
        if row["ID"].isdigit()
    ]


def _number(row: Mapping[str, str], metric: str) -> float:
    try:
        return float((row.get(metric) or "").replace(",", ""))
    except ValueError:
        return 0.0  # "n/a": a metric this device does not have


def is_named(launched: str, names: Collection[str]) -> bool:
    """True for a name of ours, or one with a number appended to keep it apart from another."""
    return launched in names or re.sub(r"_\d+$", "", launched) in names


def matched(
    planned: Sequence[Mapping[str, Any]], launches: Sequence[Launch]
) -> list[tuple[Mapping[str, Any], Launch | None]]:
    """Planned kernels with their launches: in order where there are as many, else by name, first
    come first served.

    A kernel that several steps share runs under the first step's name, so names alone do not tell
    steps apart.
    """
    if len(planned) == len(launches):
        return list(zip(planned, launches, strict=True))
    waiting: dict[str, deque[Launch]] = defaultdict(deque)
    for launch in launches:
        waiting[launch.name].append(launch)
    return [(k, waiting[k["name"]].popleft() if waiting[k["name"]] else None) for k in planned]
