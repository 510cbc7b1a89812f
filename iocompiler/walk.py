"""The walk of a graph from Dynamo's to what runs: capture, rewrite, differentiate; and the cache of
whole graphs, which spares all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

from iocompiler import engines
from iocompiler.aot import differentiated, name_sources
from iocompiler.compilation import Compilation
from iocompiler.fallback import Attempts
from iocompiler.flat import FlatGraphs, bytes_moved
from iocompiler.garbage import uncollected
from iocompiler.graph import view
from iocompiler.graph.autocast import region_entered
from iocompiler.graph.capture import capture
from iocompiler.graph.copies import copies
from iocompiler.graph.findings import findings
from iocompiler.graph.held import look
from iocompiler.graph.inputs import come_in_a_list, refuse_unusual, without_subclasses
from iocompiler.observe import Dump, Summary, Verify, dump_folder
from iocompiler.ops import target
from iocompiler.ops.decompositions import table
from iocompiler.ops.partition import partition
from iocompiler.options import Options
from iocompiler.patience import Patience
from iocompiler.pipeline import Observer, Pipeline
from iocompiler.runtime import libraries, tangents
from iocompiler.runtime.calling import Calling
from iocompiler.runtime.graph_cache import Slot, slot
from iocompiler.runtime.kernels import warm_workers
from iocompiler.versions import require_supported

if TYPE_CHECKING:
    from iocompiler.recompute.trade import Trade

Compiled = Callable[..., Any]


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
    attempts = Attempts(options, compilation)
    walk = _Walk(options, pipeline, compilation, attempts, folder, Patience())
    return walk.compile(gm, example_inputs)


@dataclass(frozen=True)
class _Walk:
    options: Options
    pipeline: Pipeline
    compilation: Compilation
    attempts: Attempts
    folder: Path | None
    patience: Patience

    def compile(self, gm: GraphModule, inputs: Sequence[Any]) -> Compiled:
        with self._undisturbed():
            if self.attempts.attempt("graph", lambda: refuse_unusual(inputs)) is None:
                return gm.forward
            self.attempts.attempt(
                "rewriting", lambda: look(gm, inputs), "reads its masks as tensors"
            )
            place = self._place(gm, inputs)
            return place.look(gm) or self._compile(gm, inputs, place)

    def _undisturbed(self) -> AbstractContextManager[None]:
        """What is measured makes tensors on the device: none may wait there for the collector."""
        return nullcontext() if self.options.measures else uncollected()

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
            graph = self.attempts.attempt(
                "rewriting", lambda: self._rewrite(gm, inputs), "runs unrewritten"
            )
        graph = graph or gm
        name_sources(graph)
        if self.options.engine == "auto" and not engines.on_cuda(graph, inputs):
            # where no pass fired, Inductor gets what it would have got without us
            chosen = graph if self.compilation.changed else gm
            run = self.attempts.attempt(
                "graph", lambda: engines.inductor(chosen, inputs, self._bounded())
            )
        else:
            libraries.load_ahead(graph)
            place.lifted(graph, gm)
            run = self.attempts.attempt("graph", lambda: self._differentiate(graph, inputs, place))
            run = run and without_subclasses(run, inputs)
        return run or gm.forward

    def _rewrite(self, gm: GraphModule, inputs: Sequence[Any]) -> GraphModule:
        if come_in_a_list(inputs):
            return gm  # autograd wrote it, not the user
        graph = capture(gm, inputs)
        self.compilation.copies = tuple(copies(graph))
        self.compilation.passes = Summary(bytes_moved if self.folder is not None else None)
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
        calling = Calling(graph, inputs)
        flat = FlatGraphs(
            self.options,
            self.pipeline,
            self.compilation,
            self.attempts,
            self.folder,
            place,
            calling,
            self._undisturbed,
            self.patience,
        )
        compiled = differentiated(
            graph,
            inputs,
            fw_compiler=flat.forward,
            bw_compiler=flat.backward,
            inference_compiler=flat.inference,
            decompositions=table(),
            partition_fn=self._bounded(flat.run_passes) or partition,
            # overwritten inputs are written by our kernels, not by a copy after each call
            keep_inference_input_mutations=True,
        )
        return calling.instead_of(tangents.without_zeros(compiled, flat.optional))

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
