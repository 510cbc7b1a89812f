"""The flat graphs that AOTAutograd makes of one Dynamo graph, each to what runs it: flat passes, a
plan, an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.fx import GraphModule, Node

from iocompiler import engines, scheduling
from iocompiler.awaited import awaited, ready
from iocompiler.compilation import Compilation, Fallback
from iocompiler.errors import ForwardOnAten
from iocompiler.fallback import Attempts
from iocompiler.graph import view
from iocompiler.graph.findings import findings
from iocompiler.graph.printer import show
from iocompiler.observe import dump_text
from iocompiler.options import Options
from iocompiler.patience import Patience
from iocompiler.pipeline import Pipeline
from iocompiler.plan.data import Plan
from iocompiler.runtime import libraries, tangents
from iocompiler.runtime.calling import Calling
from iocompiler.runtime.graph_cache import Slot
from iocompiler.runtime.tangents import Boxed


@dataclass(frozen=True)
class FlatGraphs:
    """The compilers AOTAutograd is given: of a forward and its backward, or of an inference.

    Attributes:
        place: where the disk cache will have them.
        calling: how they are called.
        undisturbed: what a backward that is compiled later is compiled in.
        patience: of what is measured of all of them.
        optional: the tangents that need not come, once the forward is compiled.
        handed_over: the results of the forward by name, among them what the backward takes.
    """

    options: Options
    pipeline: Pipeline
    compilation: Compilation
    attempts: Attempts
    folder: Path | None
    place: Slot
    calling: Calling
    undisturbed: Callable[[], AbstractContextManager[None]]
    patience: Patience
    optional: list[int] = field(default_factory=list)
    handed_over: dict[str, int] = field(default_factory=dict)

    def forward(self, flat: GraphModule, inputs: Sequence[Any]) -> Boxed:
        self.optional[:] = tangents.optional(flat)
        self.handed_over.update(view.results(flat))  # by the names they have before passes
        run = self._run(flat, inputs, "forward")
        self.calling.forward(flat, run)
        self.place.add_forward(run, self.calling)
        return run

    def inference(self, flat: GraphModule, inputs: Sequence[Any]) -> Boxed:
        run = self._run(flat, inputs, "inference")
        self.calling.inference(flat, run)
        self.place.add_inference(run, self.calling)
        return run

    def backward(self, flat: GraphModule, inputs: Sequence[Any]) -> Boxed:
        """Where tangents are optional, it is compiled when it is first known which of them come."""
        tangents.keep_graphs()
        optional = bool(self.optional)
        own = self._left_alone(flat)

        def compiled(absent: tangents.Absent) -> Boxed:
            with self.undisturbed():
                graph, given = (
                    tangents.without(flat, inputs, absent) if optional else (flat, inputs)
                )
                run = self._run(graph, given, "backward", late=optional, own=own)
                if not optional:
                    self.calling.backward(flat, run)
                self.place.add_backward(flat, absent, run, self.calling)
            return run

        if not optional:
            return compiled(())
        resumed = tangents.resumption()
        runs = tangents.Backward(tangents.of(flat), lambda absent: resumed(compiled, absent))
        self.calling.backward(flat, runs)
        return engines.boxed(runs.__call__)

    def run_passes(self, flat: GraphModule, name: str) -> None:
        self.pipeline.stage("flat").run(flat, start=name)

    def _left_alone(self, backward: GraphModule) -> frozenset[str]:
        """The inputs that a backward may write over: none where CUDA graphs are recorded, whose
        memory is their own.
        """
        forward = self.compilation.plans.get("forward")
        lost = self.attempts.has_lost("forward")
        if forward is None or lost or self.options.mode == "reduce-overhead":
            return frozenset()
        from iocompiler.plan.donated import donated
        from iocompiler.plan.peak import taken

        return donated(forward, taken(backward, self.handed_over))

    def _run(
        self,
        flat: GraphModule,
        inputs: Sequence[Any],
        name: str,
        late: bool = False,
        own: frozenset[str] = frozenset(),
    ) -> Boxed:
        if self.options.engine == "aten":
            return engines.aten(flat)

        def step() -> Boxed:
            with tangents.no_new_guards() if late else nullcontext():
                return self._plan(flat, inputs, name, own)

        run = self.attempts.attempt(name, step)
        if run is None:
            return engines.aten(flat)

        def checked() -> Boxed:
            if own and self.attempts.has_lost("forward"):
                raise ForwardOnAten
            return ready(run)

        def settled() -> Boxed:
            found = self.attempts.attempt(name, checked)
            if found is None:
                self.place.withdraw()
            return found or engines.aten(flat)

        return awaited(run, settled) if hasattr(run, "ready") else run

    def _plan(
        self, flat: GraphModule, inputs: Sequence[Any], name: str, own: frozenset[str]
    ) -> Boxed:
        # a CPU graph never needs the planner
        from iocompiler.plan.build import build_plan
        from iocompiler.plan.fallbacks import check_fallbacks
        from iocompiler.plan.padding import report_strides, settle_strides

        self.run_passes(flat, name)
        label = self._label(name)
        self.compilation.flat[label] = flat
        self.compilation.add(findings(flat))
        device = engines.device_row(flat, self.options)
        settle_strides(flat, name, inputs, device)
        plan = build_plan(flat, device, name)
        if self.options.no_fallback is not None:
            check_fallbacks(plan, flat, self.options.no_fallback)
        plan, measured, run = scheduling.scheduled(
            plan, flat, self.options, name, own, self.patience
        )
        if measured:
            self.compilation.tuned[label] = measured
        self.compilation.plans[label] = plan
        if self.folder is not None:
            dump_text(self.folder / f"{label}.txt", show(flat, bytes_moved))
            if engines.source(run):
                dump_text(self.folder / "kernels" / f"{label}.py", engines.source(run))
        report_strides(flat)
        return self._recorded(run, plan, flat, name)

    def _label(self, name: str) -> str:
        """``name``; with a number behind it for another backward of the same graph."""
        before = [label for label in self.compilation.plans if label.split("_")[0] == name]
        return f"{name}_{len(before)}" if before else name

    def _recorded(self, run: Boxed, plan: Plan, flat: GraphModule, name: str) -> Boxed:
        """Under "reduce-overhead", ``run`` as a CUDA graph; what cannot be one is written down."""
        if self.options.mode != "reduce-overhead" or self.options.engine != "auto":
            return run
        libraries.wait()
        recorded = "forward" in self.compilation.recorded
        run, reason = engines.replayed(ready(run), plan, flat, name, recorded)
        if reason:
            self.compilation.fallbacks.append(Fallback(name, f"no CUDA graph: {reason}"))
        else:
            self.compilation.recorded.add(name)
        return run


def bytes_moved(node: Node) -> Any:
    """What a call moves, as the cost model has it, for dumps."""
    from iocompiler.cost_model.rules import cost

    return cost(node).bytes
