"""AOTAutograd, called as Dynamo's own backends call it, but for what these import to log it: all of
Inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch._dynamo import disable
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import aot_module_simplified
from torch.fx import GraphModule

from iocompiler.graph.inputs import come_in_a_list


def differentiated(
    graph: GraphModule,
    inputs: Sequence[Any],
    *,
    bw_compiler: Callable[..., Any],
    **how: Any,
) -> Callable[..., Any]:
    """What runs ``graph``.

    Args:
        bw_compiler, how: the keywords of `torch._dynamo.backends.common.aot_autograd`.
    """
    if come_in_a_list(inputs):
        return aot_autograd(bw_compiler=bw_compiler, **how)(graph, inputs)

    def backward(*args: Any) -> Any:
        made = disable(bw_compiler, reason="a compiler is not traced")(*args)  # type: ignore[no-untyped-call]
        return disable(made, reason="a backward is compiled already")  # type: ignore[no-untyped-call]

    how["bw_compiler"] = backward
    counters["aot_autograd"]["total"] += 1  # DDP's buckets look at it: whether this was called
    run = aot_module_simplified(graph, inputs, **how)
    counters["aot_autograd"]["ok"] += 1
    made: Callable[..., Any] = disable(run, reason="a graph is compiled already")  # type: ignore[no-untyped-call]
    return made


def name_sources(graph: GraphModule) -> None:
    """Say where the tensors that the graph holds are from: a graph of which that is not known has,
    for AOTAutograd, neither parameters nor buffers, and each is an input like any other. It saves
    what was computed from one rather than the one that is there, and CUDA graphs copy them.
    """
    known = getattr(graph, "_param_name_to_source", {})
    tensors = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    graph._param_name_to_source = {  # type: ignore[assignment]
        name: known.get(name, ConstantSource(name)) for name in tensors
    }
