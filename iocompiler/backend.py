"""The torch.compile backend: the walk of a graph from Dynamo's to what runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch._dynamo.exc import RestartAnalysis
from torch.fx import GraphModule, Node

from iocompiler import engines
from iocompiler.aot import differentiated
from iocompiler.awaited import awaited, ready
from iocompiler.compilation import Compilation, Fallback
from iocompiler.errors import (
    BadPlanFile,
    BudgetWarning,
    FallbackTooLarge,
    FallbackWarning,
    ForwardOnAten,
    InvalidOption,
    StrictFallback,
    UnboundedFallback,
)
from iocompiler.garbage import uncollected
from iocompiler.graph import view
from iocompiler.graph.autocast import region_entered
from iocompiler.graph.capture import capture
from iocompiler.graph.copies import copies
from iocompiler.graph.findings import findings
from iocompiler.graph.held import look
from iocompiler.graph.inputs import come_in_a_list, refuse_unusual, without_subclasses
from iocompiler.graph.printer import show
from iocompiler.observe import Dump, Summary, Verify, dump_folder, dump_text
from iocompiler.ops import target
from iocompiler.ops.decompositions import table
from iocompiler.ops.partition import partition
from iocompiler.options import Options
from iocompiler.pipeline import DEFAULT, Observer, Pipeline
from iocompiler.plan.data import Plan
from iocompiler.runtime import tangents
from iocompiler.runtime.graph_cache import Slot, slot
from iocompiler.runtime.kernels import warm_workers
from iocompiler.runtime.tangents import Boxed
from iocompiler.versions import require_supported

if TYPE_CHECKING:
    from iocompiler.recompute.trade import Trade

Compiled = Callable[..., Any]
Result = TypeVar("Result")

_ON_ATEN = "runs on aten"
_ASKED_FOR = (StrictFallback, FallbackTooLarge, UnboundedFallback, BadPlanFile, BudgetWarning)


class Compiler:
    """A backend with its own pipeline and options, for ``torch.compile(model, backend=...)``.

    Args:
        pipeline: the passes to run.
        on_compiled: called with the `Compilation` of each graph once its forward is compiled; a
            backward that AOTAutograd compiles later is added to the same object.
        options: the names and values of `Options`.

    Raises:
        UnknownOption, InvalidOption: as `Options.build`; also of a ``pipeline`` that is none.
    """

    __name__ = "iocompiler"  # Dynamo shows it in logs

    def __init__(
        self,
        pipeline: Pipeline = DEFAULT,
        *,
        on_compiled: Callable[[Compilation], None] | None = None,
        **options: Any,
    ) -> None:
        self.pipeline = _pipeline(pipeline)
        self.options = Options.build(options)
        self.on_compiled = on_compiled

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Compiled:
        given = {**({} if mode is None else {"mode": mode}), **(options or {})}
        compilation = Compilation()
        run = compile_graph(
            gm, example_inputs, self.options.updated(given), self.pipeline, compilation
        )
        if self.on_compiled is not None:
            self.on_compiled(compilation)
        return run


def _pipeline(given: Any) -> Pipeline:
    if not isinstance(given, Pipeline):
        expected = "a Pipeline, such as iocompiler.DEFAULT"
        raise InvalidOption(name="pipeline", expected=expected, value=given)
    return given


def iocompiler(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The entry ``torch.compile(model, backend="iocompiler", mode=..., options={...})`` calls."""
    return Compiler()(gm, example_inputs, mode=mode, options=options)


def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    pipeline: Pipeline,
    compilation: Compilation,
) -> Compiled:
    """Walk one graph from Dynamo's to what runs.

    Args:
        gm: Dynamo's graph; it is not changed.
        example_inputs: one value a placeholder: real or fake tensors, sizes, numbers.
        compilation: filled in with what was found, planned and lost.

    Returns:
        a function of the graph's inputs. Nothing that fails in here breaks the program: the region
        then runs on aten, with one `FallbackWarning`; under ``strict``, `StrictFallback` is
        raised, under ``no_fallback`` `UnboundedFallback` or `FallbackTooLarge`.
    """
    require_supported()
    folder = dump_folder(options.dump) if options.dump else None
    return _Walk(options, pipeline, compilation, folder).compile(gm, example_inputs)


@dataclass(frozen=True)
class _Walk:
    options: Options
    pipeline: Pipeline
    compilation: Compilation
    folder: Path | None

    def compile(self, gm: GraphModule, inputs: Sequence[Any]) -> Compiled:
        with self._undisturbed():
            if self._try("graph", lambda: refuse_unusual(inputs)) is None:
                return gm.forward
            self._try("rewriting", lambda: look(gm, inputs), "reads its masks as tensors")
            place = self._place(gm, inputs)
            return place.look(gm) or self._compile(gm, inputs, place)

    def _undisturbed(self) -> AbstractContextManager[None]:
        """What is measured makes tensors on the device: none may wait there for the collector."""
        return nullcontext() if self.options.mode == "max-autotune" else uncollected()

    def _place(self, gm: GraphModule, inputs: Sequence[Any]) -> Slot:
        """Where the disk cache has this graph, or would have it."""
        load_text = engines.text_loader(self.options)
        if self.options.engine == "auto" and not engines.on_cuda(gm, inputs):
            load_text = None  # Inductor has a cache of its own
        return slot(gm, inputs, self.options, self.pipeline, self.compilation, load_text)

    def _compile(self, gm: GraphModule, inputs: Sequence[Any], place: Slot) -> Compiled:
        if self.options.engine == "auto" and engines.on_cuda(gm, inputs):
            with suppress(Exception):  # where they are needed, a failure is told
                warm_workers()  # they start while the graph is traced
        on_cpu = self.options.engine == "auto" and not engines.on_cuda(gm, inputs)
        with target.inductor() if on_cpu else nullcontext():
            graph = self._try("rewriting", lambda: self._rewrite(gm, inputs), "runs unrewritten")
        graph = graph or gm
        if self.options.engine == "auto" and not engines.on_cuda(graph, inputs):
            # where no pass fired, Inductor gets what it would have got without us
            chosen = graph if self.compilation.changed else gm
            run = self._try("graph", lambda: engines.inductor(chosen, inputs, self._bounded()))
        else:
            place.lifted(graph, gm)
            run = self._try("graph", lambda: self._differentiate(graph, inputs, place))
            run = run and without_subclasses(run, inputs)
        return run or gm.forward

    def _rewrite(self, gm: GraphModule, inputs: Sequence[Any]) -> GraphModule:
        if come_in_a_list(inputs):
            return gm  # autograd wrote it, not the user
        graph = capture(gm, inputs)
        self.compilation.copies = tuple(copies(graph))
        self.compilation.passes = Summary(_bytes_moved if self.folder is not None else None)
        observers: list[Observer] = [self.compilation.passes]
        if self.folder is not None:
            observers.append(Dump(self.folder, self.compilation.passes))
        if self.options.verify:
            observers.append(Verify(inputs))
        self._run_passes(graph, observers)
        self.compilation.graph = graph
        return graph

    def _run_passes(self, graph: GraphModule, observers: Sequence[Observer]) -> None:
        """Checkpointed regions first, each a graph of its own; a pass never sees into one."""
        regions = view.regions(graph)
        for node, inner in view.checkpoints(graph):
            with region_entered(regions[node]):
                self._run_passes(inner, ())
        self.compilation.changed += self.pipeline.stage("graph").run(graph, observers)
        self.compilation.add(findings(graph))

    def _differentiate(self, graph: GraphModule, inputs: Sequence[Any], place: Slot) -> Compiled:
        """AOTAutograd, which hands back functional graphs with nothing but tensors in and out."""
        optional: list[int] = []
        handed_over: dict[str, int] = {}

        def forward(flat: GraphModule, given: Sequence[Any]) -> Boxed:
            optional[:] = tangents.optional(flat)
            handed_over.update(view.results(flat))  # by the names they have before passes
            run = self._run_flat(flat, given, "forward", place)
            place.add("forward", flat, run)
            return run

        def backward(flat: GraphModule, given: Sequence[Any]) -> Boxed:
            tangents.keep_graphs()
            return self._backward(flat, given, place, bool(optional), handed_over)

        def inference(flat: GraphModule, given: Sequence[Any]) -> Boxed:
            run = self._run_flat(flat, given, "inference", place)
            place.add("inference", flat, run)
            return run

        compiled = differentiated(
            graph,
            inputs,
            fw_compiler=forward,
            bw_compiler=backward,
            inference_compiler=inference,
            decompositions=table(),
            partition_fn=self._bounded(self._run_flat_passes) or partition,
            # overwritten inputs are written by our kernels, not by a copy after each call
            keep_inference_input_mutations=True,
        )
        return tangents.without_zeros(compiled, optional)

    def _bounded(
        self, prepare: Callable[[GraphModule, str], None] | None = None
    ) -> Callable[..., Any] | None:
        """What partitions a training step within the option's memory; None where it sets no bound.

        Args:
            prepare: edits a flat graph before it is planned; None where Inductor will run it, which
                makes zeros for absent tangents.
        """
        if self.options.memory_budget is None:
            return None
        from iocompiler.recompute.budget import Budgeted

        def note(trade: Trade) -> None:
            self.compilation.trade = trade

        return Budgeted(
            self.options.memory_budget,
            lambda gm: engines.device_row(gm, self.options),
            prepare or (lambda flat, name: None),
            note,
            lazy=prepare is not None,
        )

    def _run_flat_passes(self, flat: GraphModule, name: str) -> None:
        self.pipeline.stage("flat").run(flat, start=name)

    def _backward(
        self,
        flat: GraphModule,
        inputs: Sequence[Any],
        place: Slot,
        optional: bool,
        handed_over: Mapping[str, int],
    ) -> Boxed:
        """The backward; where tangents are ``optional``, compiled when it is first known which of
        them come.

        Args:
            handed_over: the results of the forward by name, among them what the backward takes.
        """
        own = self._left_alone(flat, handed_over)

        def compiled(absent: tangents.Absent) -> Boxed:
            with self._undisturbed():
                graph, given = (
                    tangents.without(flat, inputs, absent) if optional else (flat, inputs)
                )
                run = self._run_flat(graph, given, "backward", place, late=optional, own=own)
                place.add_backward(flat, absent, run)
            return run

        if not optional:
            return compiled(())
        resumed = tangents.resumption()
        runs = tangents.Backward(tangents.of(flat), lambda absent: resumed(compiled, absent))
        return engines.boxed(runs.__call__)

    def _left_alone(self, backward: GraphModule, handed_over: Mapping[str, int]) -> frozenset[str]:
        """The inputs that a backward may write over: none where CUDA graphs are recorded, whose
        memory is their own.
        """
        forward = self.compilation.plans.get("forward")
        if forward is None or self._forward_lost() or self.options.mode == "reduce-overhead":
            return frozenset()
        from iocompiler.plan.donated import donated
        from iocompiler.plan.peak import taken

        return donated(forward, taken(backward, handed_over))

    def _forward_lost(self) -> bool:
        return any(lost.region == "forward" for lost in self.compilation.fallbacks)

    def _run_flat(
        self,
        flat: GraphModule,
        inputs: Sequence[Any],
        name: str,
        place: Slot,
        late: bool = False,
        own: frozenset[str] = frozenset(),
    ) -> Boxed:
        if self.options.engine == "aten":
            return engines.aten(flat)

        def step() -> Boxed:
            with tangents.no_new_guards() if late else nullcontext():
                return self._plan(flat, inputs, name, own)

        run = self._try(name, step)
        if run is None:
            return engines.aten(flat)

        def checked() -> Boxed:
            if own and self._forward_lost():
                raise ForwardOnAten
            return ready(run)

        def settled() -> Boxed:
            found = self._try(name, checked)
            if found is None:
                place.withdraw()
            return found or engines.aten(flat)

        return awaited(run, settled) if hasattr(run, "ready") else run

    def _plan(
        self, flat: GraphModule, inputs: Sequence[Any], name: str, own: frozenset[str]
    ) -> Boxed:
        # a CPU graph never needs the planner
        from iocompiler.plan.build import build_plan
        from iocompiler.plan.fallbacks import check_fallbacks
        from iocompiler.plan.padding import report_strides, settle_strides

        self._run_flat_passes(flat, name)
        label = self._label(name)
        self.compilation.flat[label] = flat
        self.compilation.add(findings(flat))
        device = engines.device_row(flat, self.options)
        settle_strides(flat, name, inputs, device)
        plan = build_plan(flat, device, name)
        if self.options.no_fallback is not None:
            check_fallbacks(plan, flat, self.options.no_fallback)
        plan, measured, run = engines.scheduled(plan, flat, self.options, name, own)
        if measured:
            self.compilation.tuned[label] = measured
        self.compilation.plans[label] = plan
        if self.folder is not None:
            dump_text(self.folder / f"{label}.txt", show(flat, _bytes_moved))
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
        recorded = "forward" in self.compilation.recorded
        run, reason = engines.replayed(ready(run), plan, flat, name, recorded)
        if reason:
            self.compilation.fallbacks.append(Fallback(name, f"no CUDA graph: {reason}"))
        else:
            self.compilation.recorded.add(name)
        return run

    def _try(
        self, region: str, step: Callable[[], Result], instead: str = _ON_ATEN
    ) -> Result | None:
        """What the step returns; None, one record and one warning where it fails."""
        try:
            return step()
        except (RestartAnalysis, *_ASKED_FOR):
            raise  # Dynamo's way to start over; what has been through here
        except Exception as error:
            self._fallback(region, error, instead)
            return None

    def _fallback(self, region: str, error: Exception, instead: str) -> None:
        message = (str(error).strip() or repr(error)).splitlines()[0]
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        cause = f"{type(error).__name__}: {message}{notes}"
        self.compilation.fallbacks.append(Fallback(region, cause, getattr(error, "where", "")))
        if self.options.strict:
            raise StrictFallback(region=region, cause=cause) from error
        if self.options.no_fallback is not None and instead == _ON_ATEN:
            raise UnboundedFallback(region=region, cause=cause) from error
        text = f"iocompiler: {region} failed, the graph {instead}: {cause}"
        warnings.warn(text, FallbackWarning, stacklevel=2)


def _bytes_moved(node: Node) -> Any:
    from iocompiler.cost_model.rules import cost

    return cost(node).bytes
