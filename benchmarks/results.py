"""Append JSON files of groups to RESULTS.md as a dated section: ``python -m benchmarks.results
a.json b.json``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.table import markdown, shown

RESULTS = Path(__file__).with_name("RESULTS.md")


def main() -> None:
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    found.add_argument("json", nargs="+", help="what --json wrote")
    found.add_argument("--to", default=str(RESULTS), help="default benchmarks/RESULTS.md")
    found.add_argument("--title", default="", help="put before the section's date")
    args = found.parse_args()
    groups = [json.loads(Path(path).read_text()) for path in args.json]
    target = Path(args.to)
    before = target.read_text().rstrip() if target.exists() else ""
    target.write_text(f"{before}\n\n{section(groups, args.title)}".lstrip())


def section(groups: list[Mapping[str, Any]], title: str = "") -> str:
    """One dated section: machine and versions once, then each group's command, table, summary and
    notes."""
    facts = groups[0]["facts"]
    place = ", ".join(
        f"{name} {facts[name]}" for name in ("torch", "triton", "transformers", "python")
    )
    heading = f"{title}, {facts['date']}" if title else str(facts["date"])
    lines = [f"## {heading}", "", f"{facts['device']}; {place}.", ""]
    for group in groups:
        lines += _group(group)
    return "\n".join(lines).rstrip() + "\n"


def _group(group: Mapping[str, Any]) -> list[str]:
    facts, rows = group["facts"], group["rows"]
    known = ("date", "device", "torch", "triton", "transformers", "python", "command")
    extra = "".join(
        f"; {name} {shown(value)}" for name, value in facts.items() if name not in known
    )
    lines = [f"### {group['title']}", "", f"`{facts['command']}`{extra}", ""]
    lines += [markdown(group["columns"], rows), ""]
    lines += [f"- {name}: {shown(value)}" for name, value in group["summary"].items()]
    lines += [f"- note, {row.get('name')}: {shown(row['note'])}" for row in rows if row.get("note")]
    return [*lines, ""]


if __name__ == "__main__":
    main()
