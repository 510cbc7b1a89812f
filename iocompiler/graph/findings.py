"""What a pass found and what it only nearly found; both travel in the graph module's metadata to
the report.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

_KEY = "iocompiler_findings"


@dataclass(frozen=True)
class Rewrite:
    """A recognised pattern: its name ("attention"), the user's line ("model.py:88") and the form
    taken.
    """

    pattern: str
    where: str
    variant: str = ""


@dataclass(frozen=True)
class Miss:
    """A near miss: the broken condition, or the cost inequality with its numbers."""

    pattern: str
    where: str
    reason: str


def record(gm: GraphModule, finding: Rewrite | Miss) -> None:
    """Append a finding to the graph module."""
    gm.meta.setdefault(_KEY, []).append(finding)


def findings(gm: GraphModule) -> tuple[Rewrite | Miss, ...]:
    """Every finding recorded on the graph module, in order."""
    return tuple(gm.meta.get(_KEY, ()))
