"""What runs a graph: Triton for CUDA, Inductor's C++ for the CPU, the reference interpreter for
tests, aten last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch._guards import TracingContext
from torch.fx import GraphModule

from iocompiler.cost_model.device import DEVICES, Device
from iocompiler.errors import StrictFallback, UnboundedFallback
from iocompiler.ops.attempt import refusing
from iocompiler.options import Options
from iocompiler.plan.data import Plan
from iocompiler.runtime import tangents
from iocompiler.runtime.graph_cache import LoadText
from iocompiler.runtime.tangents import Boxed


def load(plan: Plan, gm: GraphModule, options: Options, name: str) -> Boxed:
    """Make the plan of the flat graph ``gm`` run on the engine of the options. What has the
    attribute ``source`` can be loaded again from that text, of what has the attribute ``ready``
    the kernels are still being compiled.
    """
    return _as_asked(_begun(plan, gm, options, name), options)


def _as_asked(run: Boxed, options: Options) -> Boxed:
    """``run``; where the options want an error, one when a template of an operator fails."""
    if options.strict:
        return refusing(run, StrictFallback)
    return run if options.no_fallback is None else refusing(run, UnboundedFallback)


def _begun(plan: Plan, gm: GraphModule, options: Options, name: str) -> Boxed:
    if callable(options.engine):
        return boxed(options.engine(plan, gm))
    if options.engine == "reference":
        from iocompiler.runtime.reference import run_plan

        return boxed(lambda args: run_plan(plan, args))
    from iocompiler.plan.build import size_hints
    from iocompiler.runtime.load import begin

    return begin(plan, torch.device(plan.device), name, size_hints(gm))


def text_loader(options: Options) -> LoadText | None:
    """How the engine of the options runs the text of a module: `runtime.load.load_text`, or the
    ``load_text`` of an engine of one's own; None for an engine that knows only plans.
    """
    load_text: LoadText | None = getattr(options.engine, "load_text", None)
    if options.engine == "auto":
        from iocompiler.runtime.load import load_text
    if load_text is None:
        return None
    loader = load_text
    return lambda text, name, device: _as_asked(loader(text, name, device), options)


def replayed(
    run: Boxed, plan: Plan, gm: GraphModule, name: str, forward: bool
) -> tuple[Boxed, str]:
    """``run`` recorded as a CUDA graph, and "" or why that cannot be.

    Args:
        name: "forward", "backward" or "inference".
        forward: for a backward, whether its forward was recorded, in whose pool the saved tensors
            lie.
    """
    from iocompiler.runtime import graphs

    backward = name == "backward"
    static = _saved_inputs(gm) if backward else fixed_inputs()
    reason = graphs.obstacle(plan, static)
    device = torch.device(plan.device).index or 0
    if backward and not forward:
        return run, reason or "the forward is none"
    if reason:
        return (boxed(graphs.plain_backward(run, device)) if backward else run), reason
    recorded = graphs.record(
        run,
        plan,
        device,
        static_inputs=static,
        returned=0 if backward else _returned(plan),
        is_backward=backward,
        is_inference=name == "inference",
    )
    return boxed(recorded), ""


def fixed_inputs() -> list[int]:
    """Positions of parameters and buffers, which stay where they are from call to call."""
    metadata = _metadata()
    return list(metadata.static_input_indices or ()) if metadata is not None else []


def _returned(plan: Plan) -> int:
    """How many outputs are the caller's: a forward has what it saves behind them."""
    metadata = _metadata()
    return len(plan.outputs) if metadata is None else metadata.num_forward_returns


def _metadata() -> Any:
    """What AOTAutograd knows of the graph it is compiling, or None."""
    context = TracingContext.try_get()
    return context.fw_metadata if context is not None else None


def _saved_inputs(gm: GraphModule) -> list[int]:
    """Positions of what the forward saved, AOTAutograd putting the tangents last."""
    later = set(tangents.of(gm))
    count = len(gm.graph.find_nodes(op="placeholder"))
    return [position for position in range(count) if position not in later]


def aten(gm: GraphModule) -> Boxed:
    """The graph itself, node by node, values freed when dead."""
    return boxed(lambda args: torch.fx.Interpreter(gm).boxed_run(args))


def inductor(
    gm: GraphModule, example_inputs: Sequence[Any], partition: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Inductor's C++ on a graph before autograd; raises where this machine has no C++ compiler.

    Args:
        partition: instead of Inductor's own choice of what is kept for the backward.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.decomposition import select_decomp_table

    from iocompiler.ops.attention_inductor import decompositions

    get_cpp_compiler()
    patches: dict[str, Any] = {}
    if partition is not None:
        # a graph found in Inductor's cache would not be partitioned, and its trade not be known
        patches = {
            "custom_partitioner_fn": _for_inductor(partition),
            "force_disable_caches": True,
        }
    ours = decompositions(gm)
    table = {**select_decomp_table(), **ours} if ours else None
    with _tagged() if ours else nullcontext():
        run = compile_fx(gm, example_inputs, config_patches=patches, decompositions=table)
    return cast("Callable[..., Any]", run)


def _tagged() -> AbstractContextManager[object]:
    """Inductor's caches do not look at decompositions: their keys name those of ours."""
    from iocompiler.runtime.cache import key_of

    config: Any = torch.compiler.config
    patched: AbstractContextManager[object] = config.patch(
        cache_key_tag=f"{config.cache_key_tag} iocompiler {key_of('inductor')}"
    )
    return patched


def _for_inductor(partition: Callable[..., Any]) -> Any:
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    class Partitioner(CustomPartitionerFn):
        def __call__(self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
            return partition(gm, joint_inputs, **kwargs)

        def uuid(self) -> None:
            """No name for Inductor's cache."""

    return Partitioner()


def source(run: Boxed) -> str:
    """The Python file behind a loaded plan; "" for what has none."""
    return str(getattr(run, "source", ""))


def boxed(function: Callable[[list[Any]], Any]) -> Boxed:
    """Mark a function of one list as such for AOTAutograd."""
    if getattr(function, "_boxed_call", False):
        return function

    def run(args: list[Any]) -> Any:
        return function(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def on_cuda(gm: GraphModule, example_inputs: Sequence[Any]) -> bool:
    """True where any tensor of the graph lives on a CUDA device."""
    nodes = gm.graph.nodes
    values = [
        *example_inputs,
        *(node.meta.get("val", node.meta.get("example_value")) for node in nodes),
    ]
    return any(isinstance(x, torch.Tensor) and x.device.type == "cuda" for x in values)


def device_row(gm: GraphModule, options: Options) -> Device:
    """The row the graph is priced for: the option's, else that of the CUDA device it runs on, else
    the H200's.
    """
    if options.device:
        return DEVICES[options.device]
    for node in gm.graph.nodes:
        found = node.meta.get("val")
        if (
            isinstance(found, torch.Tensor)
            and found.device.type == "cuda"
            and torch.cuda.is_available()
        ):
            from iocompiler.cost_model.device import current_device

            return current_device(found.device)
    return DEVICES["h200"]
