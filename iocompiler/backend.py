"""The torch.compile backend: the walk of a graph from Dynamo's to what runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import RestartAnalysis
from torch.fx import GraphModule

from iocompiler import engines
from iocompiler.compilation import Compilation, Fallback
from iocompiler.engines import Boxed
from iocompiler.errors import FallbackWarning, StrictFallback
from iocompiler.graph.capture import capture
from iocompiler.graph.findings import Rewrite, findings
from iocompiler.observe import Dump, Summary, Verify
from iocompiler.options import Options
from iocompiler.pipeline import DEFAULT, Observer, Pipeline

Compiled = Callable[..., Any]


class Compiler:
    """A backend with its own pipeline and options: ``torch.compile(model, backend=Compiler(strict=True))``.

    Args:
        pipeline: the passes to run.
        on_compiled: called with the `Compilation` of each graph once its forward is compiled; a backward that
            AOTAutograd compiles later is added to the same object.
        options: the names and values of `Options`.

    Raises:
        UnknownOption, InvalidOption: as `Options.build`.
    """

    __name__ = "iocompiler"  # Dynamo shows it in logs

    def __init__(
        self,
        pipeline: Pipeline = DEFAULT,
        *,
        on_compiled: Callable[[Compilation], None] | None = None,
        **options: Any,
    ) -> None:
        self.pipeline = pipeline
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
        run = compile_graph(gm, example_inputs, self.options.updated(given), self.pipeline, compilation)
        if self.on_compiled is not None:
            self.on_compiled(compilation)
        return run


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
    """The whole walk: capture, rewrite, then differentiate, plan and load, or hand over to Inductor's C++.

    Args:
        gm: Dynamo's graph; it is not changed.
        example_inputs: one value a placeholder, real or fake tensors, sizes, numbers.
        compilation: filled in with what was found, planned and lost.

    Returns:
        a function of the graph's inputs. Nothing that fails in here breaks the program: the region then runs on
        aten, with one `FallbackWarning`, or `StrictFallback` is raised under ``strict``.
    """
    graph = _attempt("graph", options, compilation, partial(_rewritten, gm, example_inputs, options, pipeline, compilation))
    graph = gm if graph is None else graph
    if options.engine == "auto" and not engines.on_cuda(graph, example_inputs):
        chosen = graph if compilation.changed else gm
        run = _attempt("graph", options, compilation, partial(engines.inductor, chosen, example_inputs))
    else:
        compile_flat = partial(_flat, options=options, pipeline=pipeline, compilation=compilation)
        run = _attempt("graph", options, compilation, partial(differentiate, graph, example_inputs, compile_flat))
    return gm.forward if run is None else run


def _rewritten(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    pipeline: Pipeline,
    compilation: Compilation,
) -> GraphModule:
    graph = capture(gm, example_inputs)
    summary = Summary()
    compilation.passes = summary
    observers: list[Observer] = [Dump(Path(options.dump), summary) if options.dump else summary]
    if options.verify:
        observers.append(Verify(example_inputs))
    changed = pipeline.stage("graph").run(graph, observers)
    found = findings(graph)
    compilation.graph, compilation.changed = graph, changed
    compilation.rewrites += [f for f in found if isinstance(f, Rewrite)]
    compilation.misses += [f for f in found if not isinstance(f, Rewrite)]
    return graph


def differentiate(
    graph: GraphModule, example_inputs: Sequence[Any], compile_flat: Callable[[GraphModule, str], Boxed]
) -> Compiled:
    """AOTAutograd on the rewritten graph; ``compile_flat(graph, name)`` makes each flat functional graph run."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    compiled: Compiled = aot_autograd(
        fw_compiler=lambda flat, _: compile_flat(flat, "forward"),
        bw_compiler=lambda flat, _: compile_flat(flat, "backward"),
        inference_compiler=lambda flat, _: compile_flat(flat, "inference"),
        decompositions=_decompositions(),
        partition_fn=min_cut_rematerialization_partition,
    )(graph, example_inputs)
    return compiled


def _decompositions() -> dict[Any, Any]:
    try:
        from iocompiler.ops.decompositions import table
    except ModuleNotFoundError:
        return {}
    return table()


def _flat(
    flat: GraphModule, name: str, *, options: Options, pipeline: Pipeline, compilation: Compilation
) -> Boxed:
    if options.engine == "aten":
        return engines.aten(flat)
    plan = partial(engines.planned, flat, name, options, pipeline.stage("flat"), compilation)
    run = _attempt(name, options, compilation, plan)
    return engines.aten(flat) if run is None else run


def _attempt(region: str, options: Options, compilation: Compilation, step: Callable[[], Any]) -> Any:
    """The step's result; None, a record and one warning where it fails (an error under ``strict``)."""
    try:
        return step()
    except RestartAnalysis:
        raise  # Dynamo's way to start over: not a failure
    except Exception as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        cause = f"{type(error).__name__}: {(str(error).strip() or repr(error)).splitlines()[0]}{notes}"
        compilation.fallbacks.append(Fallback(region, cause, getattr(error, "where", "")))
        if options.strict:
            raise StrictFallback(region=region, cause=cause) from error
        warnings.warn(f"iocompiler: {region} runs on aten: {cause}", FallbackWarning, stacklevel=2)
        return None
