"""AOTAutograd, called as Dynamo's own backends call it, but for what these import to log it: all of
Inductor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

from torch._dynamo import disable
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd import graph_compile
from torch._functorch.aot_autograd import aot_module_simplified
from torch._logging._internal import trace_log
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
    with _unwritten():
        run = aot_module_simplified(graph, inputs, **how)
    counters["aot_autograd"]["ok"] += 1
    made: Callable[..., Any] = disable(run, reason="a graph is compiled already")  # type: ignore[no-untyped-call]
    return made


def _unwritten() -> AbstractContextManager[Any]:
    """AOTAutograd writes down each graph of a training step as text: here only where a log or its
    own cache reads that.
    """
    logs = graph_compile.aot_joint_log, graph_compile.aot_graphs_log
    if trace_log.handlers or any(log.isEnabledFor(logging.INFO) for log in logs):
        return nullcontext()
    written: dict[str, Any] = {
        name: _for_a_cache(getattr(graph_compile, name), unwritten)
        for name, unwritten in (("_log_joint_graph", None), ("_log_fw_bw_graphs", (None, None)))
    }
    patched: AbstractContextManager[Any] = mock.patch.multiple(graph_compile, **written)
    return patched


def _for_a_cache(write: Callable[..., Any], unwritten: Any) -> Callable[..., Any]:
    """``write``, called where AOTAutograd's cache keeps what it returns."""
    return lambda *about: unwritten if about[-1].cache_info is None else write(*about)


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
