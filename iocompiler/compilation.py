"""What compiling one Dynamo graph produced: the record every report is made from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch.fx import GraphModule

from iocompiler.graph.findings import Miss, Rewrite

if TYPE_CHECKING:
    from iocompiler.observe import Summary
    from iocompiler.plan.data import Plan


@dataclass(frozen=True)
class Fallback:
    """A region that runs on aten, or unrewritten, and why: ``region`` is "graph", "forward",
    "backward" ...
    """

    region: str
    cause: str
    where: str = ""


@dataclass
class Compilation:
    """Filled in as the walk goes; "forward" and "backward" or "inference" name the flat graphs and
    their plans.

    Attributes:
        graph: the captured and rewritten graph; None where capture failed.
        rewrites, misses: what the passes found.
        plans: the plan of each flat graph that was planned. A backward may come later than the
            forward. flat: the flat graphs themselves, under the same names. fallbacks: what runs on
            aten, and why. changed: sites changed by passes that do more than respell. passes: the
            table of passes, with sites and milliseconds.
    """

    graph: GraphModule | None = None
    rewrites: list[Rewrite] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    plans: dict[str, Plan] = field(default_factory=dict)
    flat: dict[str, GraphModule] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    changed: int = 0
    passes: Summary | None = None

    def add(self, found: Iterable[Rewrite | Miss]) -> None:
        """Sort what passes recorded on a graph into rewrites and misses."""
        for finding in found:
            if isinstance(finding, Rewrite):
                self.rewrites.append(finding)
            else:
                self.misses.append(finding)
