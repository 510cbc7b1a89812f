"""Rows to a plain table and to JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks.timing import device_name

Cell: TypeAlias = "str | float | int | None"
Row: TypeAlias = "dict[str, Cell]"


@dataclass
class Table:
    """What one group found. ``columns`` chooses and orders what is printed; JSON keeps every key of
    every row."""

    title: str
    columns: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    summary: dict[str, Cell] = field(default_factory=dict)
    facts: dict[str, Cell] = field(default_factory=lambda: environment())

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "columns": list(self.columns),
            "facts": self.facts,
            "rows": self.rows,
            "summary": self.summary,
        }

    def markdown(self) -> str:
        return markdown(self.columns, self.rows)

    def write(self, path: str | None) -> None:
        """Write the JSON as far as it goes, where a path is given."""
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(self.as_json(), indent=1) + "\n")

    def finish(self, path: str | None) -> None:
        """Write the JSON, then print notes and, last, the table."""
        self.write(path)
        for row in self.rows:
            if row.get("note"):
                print(f"note: {row.get('name')}: {row['note']}")
        facts = [
            f"{name} {shown(value)}" for name, value in self.facts.items() if name != "command"
        ]
        print(f"\n{self.title}: {', '.join(facts)}")
        print(self.markdown())
        for name, value in self.summary.items():
            print(f"{name}: {shown(value)}")
        sys.stdout.flush()


def environment() -> dict[str, Cell]:
    """Date, machine, versions and command of this run."""
    found: dict[str, Cell] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
    }
    return found


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else os.path.basename(sys.argv[0])


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def markdown(columns: Sequence[str], rows: Sequence[Mapping[str, Cell]]) -> str:
    """A Markdown table, padded so that it reads well as plain text too."""
    cells = [list(columns), *([shown(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def shown(value: Cell) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")


def geometric_mean(values: Sequence[Cell]) -> float | None:
    """Of the positive numbers among ``values``; None where there is none."""
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and v > 0]
    return math.exp(sum(map(math.log, numbers)) / len(numbers)) if numbers else None


def ratio(ours: Cell, theirs: Cell) -> float | None:
    if isinstance(ours, (int, float)) and isinstance(theirs, (int, float)) and theirs > 0:
        return float(ours) / float(theirs)
    return None
