"""The key of a graph in the disk cache: its own text, and all else that decides what comes out."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo
from torch._guards import TracingContext
from torch.fx import GraphModule

from iocompiler.errors import NotCacheable
from iocompiler.graph.fingerprint import fingerprint
from iocompiler.graph.settings import settings
from iocompiler.options import Options
from iocompiler.pipeline import Pipeline
from iocompiler.runtime.identity import identity


def key_text(gm: GraphModule, inputs: Sequence[Any], options: Options, pipeline: Pipeline) -> str:
    """Options, passes with the hashes of their sources, torch's settings and the GPUs as JSON, then
    the graph as `fingerprint` has it. Versions are added by `cache.key_of`.

    Raises:
        NotCacheable: the graph, or the place it is compiled in, is not one to keep.
    """
    refuse_options(options)
    refuse_surroundings()
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    if callable(options.engine):
        given["engine"] = identity(options.engine)
    around = {
        "options": given,
        "passes": _passes(pipeline),
        "settings": settings(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
    }
    return f"{json.dumps(around, indent=1, sort_keys=True)}\n{fingerprint(gm, inputs)}"


def refuse_options(options: Options) -> None:
    """Raise `NotCacheable` where an option asks for what only a compilation does."""
    if not options.cache:
        raise NotCacheable(cause="the option cache is off")
    if options.mode == "reduce-overhead":
        raise NotCacheable(cause="CUDA graphs are recorded anew")
    if options.plan:
        raise NotCacheable(cause="the schedules are those of a plan file")
    for name in ("dump", "verify"):
        if getattr(options, name):
            raise NotCacheable(cause=f"the option {name} wants every pass to run")


def refuse_surroundings() -> None:
    """Raise `NotCacheable` where a graph is compiled in a place that changes how it is called."""
    context = TracingContext.try_get()
    if context is None:
        raise NotCacheable(cause="it does not come from Dynamo")
    if getattr(context, "fakify_first_call", False):
        raise NotCacheable(cause="its first call is fake")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotCacheable(cause="it is inside of vmap, grad or vjp")
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise NotCacheable(cause="hooks on saved tensors are in force")
    if torch._dynamo.compiled_autograd.compiled_autograd_enabled:
        raise NotCacheable(cause="compiled autograd is on")


@functools.lru_cache(maxsize=16)
def _passes(pipeline: Pipeline) -> list[str]:
    try:
        return [f"{each.name} {each.stage} {identity(each)}" for each in pipeline]
    except NotCacheable as error:
        raise NotCacheable(cause=f"a pass: {error}") from error


@functools.lru_cache(maxsize=64)
def _gpu(index: int) -> list[Any]:
    found = torch.cuda.get_device_properties(index)
    return [found.name, found.major, found.minor, found.multi_processor_count, found.total_memory]
