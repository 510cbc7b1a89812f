"""What compiling one Dynamo graph produced: the record every report is made from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from torch.fx import GraphModule

from iocompiler.graph.copies import Copy
from iocompiler.graph.findings import Miss, Rewrite

if TYPE_CHECKING:
    from iocompiler.observe import Summary
    from iocompiler.plan.data import Plan
    from iocompiler.recompute.trade import Trade
    from iocompiler.runtime.tune import Tuned
    from iocompiler.runtime.tune_matmul import Folding
    from iocompiler.runtime.tune_products import Selection

    Measured: TypeAlias = Tuned | Folding | Selection


@dataclass(frozen=True)
class Fallback:
    """A region that runs on aten, unrewritten or unrecorded, and why.

    ``region`` is "rewriting", "graph", or the name of a flat graph.
    """

    region: str
    cause: str
    where: str = ""


@dataclass
class Compilation:
    """Filled in as the walk goes.

    Flat graphs and their plans are named "forward" and "backward", or "inference". A backward may
    be added long after the forward; one for other gradients than the first is "backward_1".

    Attributes:
        graph: the captured and rewritten graph; None where that failed.
        rewrites, misses: what the passes found.
        copies: those the program asks for, as it was captured.
        plans: the plan of each flat graph that was planned.
        flat: the flat graphs themselves, under the same names.
        fallbacks: what runs on aten, or unrecorded, and why.
        recorded: names of the flat graphs that are replayed as CUDA graphs.
        tuned: what was measured of the kernels of each flat graph, of its products with the kernels
            behind them, and of a library's algorithms for its products, under
            mode="max-autotune".
        trade: memory for time, where the option memory_budget bounds the step.
        changed: sites changed by passes that do more than respell.
        passes: the table of passes, with sites and milliseconds.
        cache: "found" where the graph came from the disk cache (then there are neither graphs nor
            plans here, and the lines in the findings are those of when it was made), "stored" where
            it went there, or "not cached: " and why.
    """

    graph: GraphModule | None = None
    rewrites: list[Rewrite] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    copies: tuple[Copy, ...] = ()
    plans: dict[str, Plan] = field(default_factory=dict)
    flat: dict[str, GraphModule] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    recorded: set[str] = field(default_factory=set)
    tuned: dict[str, tuple[Measured, ...]] = field(default_factory=dict)
    trade: Trade | None = None
    changed: int = 0
    passes: Summary | None = None
    cache: str = ""

    def add(self, found: Iterable[Rewrite | Miss]) -> None:
        """Sort what passes recorded on a graph into rewrites and misses."""
        for finding in found:
            if isinstance(finding, Rewrite):
                self.rewrites.append(finding)
            else:
                self.misses.append(finding)
