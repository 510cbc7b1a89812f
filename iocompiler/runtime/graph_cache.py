"""Whole graphs in the disk cache: a second process finds a graph's modules by its text and runs
them, with nothing traced, planned or compiled.

An entry (kind "graphs") holds the emitted modules, the text of its key and one JSON: how the
modules are called, the constants among their inputs, the guards that tracing laid on symbolic
sizes, and what the passes found. Under one key several entries may stand, told apart by their
guards.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch._guards import TracingContext
from torch.fx import GraphModule

from iocompiler.compilation import Compilation
from iocompiler.errors import NotCacheable
from iocompiler.graph.findings import Miss, Rewrite
from iocompiler.graph.fingerprint import fingerprint, shape_environment, tensor_bytes
from iocompiler.graph.settings import settings
from iocompiler.options import Options
from iocompiler.pipeline import Pipeline
from iocompiler.runtime.autograd import Boxed, callable_of
from iocompiler.runtime.cache import Cache, Entry, default_cache, key_of
from iocompiler.runtime.convention import Convention, read
from iocompiler.runtime.identity import identity

LoadText: TypeAlias = Callable[[str, str, str], Boxed]
"""``(text, name, device)`` to the function that runs it."""

_KIND = "graphs"
_KEY = "key.txt"
_GUARDED = 8  # entries under one key
_LARGEST = 2**16  # bytes of a constant kept in an entry


@dataclass
class Slot:
    """The place of one graph in the cache.

    Attributes:
        reason: why the graph has none; "" where it has one.
        found: the function of an entry that fits; None where there is none yet.
    """

    gm: GraphModule
    inputs: Sequence[Any]
    compilation: Compilation
    load_text: LoadText | None = None
    cache: Cache | None = None
    text: str = ""
    key: str = ""
    reason: str = ""
    constants: list[dict[str, Any]] = field(default_factory=list)
    modules: dict[str, tuple[str, str]] = field(default_factory=dict)
    forward: tuple[GraphModule, Any] | None = None

    def look(self) -> Callable[..., Any] | None:
        """The function of an entry that fits, its findings added to the compilation."""
        if self.cache is None or self.load_text is None:
            return None
        for number in range(_GUARDED):
            key = f"{self.key}-{number}"
            entry = self.cache.get(_KIND, key)
            if entry is None:
                return None
            try:
                if _hold(entry.meta["guards"], self.gm):
                    run = self._open(entry)
                    self.compilation.cache = "found"
                    return run
            except Exception as error:
                # whatever is wrong with it, it is made again
                self.cache.discard(_KIND, key, f"{type(error).__name__}: {error}")
                return None
        self.refuse("the sizes of this graph vary too much")
        return None

    def _open(self, entry: Entry) -> Callable[..., Any]:
        assert self.load_text is not None
        meta = entry.meta
        if entry.files[_KEY].decode() != self.text:
            raise ValueError("it was made for another graph")
        convention = Convention.from_json(meta["convention"])
        if convention.inputs != len(meta["constants"]) + len(self.inputs):
            raise ValueError("it takes another number of inputs")
        loaded = {
            name: self.load_text(entry.files[f"{name}.py"].decode(), name, device)
            for name, device in meta["devices"].items()
        }
        constants = [_constant(row, self.gm) for row in meta["constants"]]
        forward = loaded["inference"] if convention.training is None else loaded["forward"]
        run = callable_of(convention, forward, loaded.get("backward"), constants)
        rewrites = [Rewrite(**row) for row in meta["rewrites"]]
        self.compilation.add([*rewrites, *(Miss(**row) for row in meta["misses"])])
        self.compilation.changed = int(meta["changed"])
        return run

    def refuse(self, reason: str) -> None:
        """The graph is not kept, because of ``reason``."""
        if not self.reason:
            self.reason = reason
            self.compilation.cache = f"not cached: {reason}"
        self.cache = None

    def lifted(self, graph: GraphModule) -> None:
        """Take note of the tensors in ``graph`` itself: AOTAutograd makes them its first inputs."""
        if self.cache is None:
            return
        own = {id(tensor): name for name, tensor in _tensors(self.gm)}
        try:
            self.constants = [_describe(tensor, own) for _, tensor in _tensors(graph)]
        except NotCacheable as error:
            self.refuse(str(error))

    def add(self, name: str, flat: GraphModule, run: Boxed) -> None:
        """Take a compiled flat graph in; with the last one of the graph, write the entry."""
        if self.cache is None:
            return
        module = getattr(run, "module", None)
        self.modules[name] = (getattr(run, "source", ""), str(getattr(module, "device", "")))
        try:
            if name == "forward":
                self.forward = (flat, _metadata())
            elif name == "inference":
                self._write(read(_metadata(), flat))
            elif self.forward is not None:
                graph, metadata = self.forward
                self._write(read(metadata, graph, flat))
        except Exception as error:
            self.refuse(str(error) or type(error).__name__)
        if name != "forward":
            self.forward = None  # the graphs are not needed any more

    def _write(self, convention: Convention) -> None:
        assert self.cache is not None
        lost = self.compilation.fallbacks
        if lost or not all(text for text, _ in self.modules.values()):
            raise NotCacheable(cause=f"{lost[0].region if lost else 'a graph'} runs on aten")
        if convention.inputs != len(self.constants) + len(self.inputs):
            raise NotCacheable(cause="the flat graph takes other inputs")
        meta = {
            "convention": convention.as_json(),
            "constants": self.constants,
            "guards": _guards(self.gm),
            "devices": {name: device for name, (_, device) in self.modules.items()},
            "rewrites": [dataclasses.asdict(found) for found in self.compilation.rewrites],
            "misses": [dataclasses.asdict(found) for found in self.compilation.misses],
            "changed": self.compilation.changed,
        }
        files = {f"{name}.py": text.encode() for name, (text, _) in self.modules.items()}
        files[_KEY] = self.text.encode()
        for number in range(_GUARDED):
            key = f"{self.key}-{number}"
            if self.cache.get(_KIND, key) is None:
                if self.cache.store(_KIND, key, files, meta) is not None:
                    self.compilation.cache = "stored"
                return


def slot(
    gm: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    pipeline: Pipeline,
    compilation: Compilation,
    load_text: LoadText | None,
) -> Slot:
    """The place of Dynamo's graph in the cache.

    Args:
        load_text: makes the text of a module run; None where the engine has no text.
    """
    place = Slot(gm, inputs, compilation, load_text)
    try:
        _refuse_options(options, load_text)
        _refuse_surroundings()
        place.text = _key_text(gm, inputs, options, pipeline)
        place.key = key_of("graph", place.text)
        place.cache = default_cache()
    except Exception as error:  # a graph that cannot be told apart is compiled, as ever
        place.refuse(str(error) or type(error).__name__)
    return place


def _refuse_options(options: Options, load_text: LoadText | None) -> None:
    if not options.cache:
        raise NotCacheable(cause="the option cache is off")
    if load_text is None:
        raise NotCacheable(cause="the engine keeps no text")
    if options.mode == "reduce-overhead":
        raise NotCacheable(cause="CUDA graphs are recorded anew")
    for name in ("dump", "verify"):
        if getattr(options, name):
            raise NotCacheable(cause=f"the option {name} wants every pass to run")


def _refuse_surroundings() -> None:
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


def _key_text(gm: GraphModule, inputs: Sequence[Any], options: Options, pipeline: Pipeline) -> str:
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


def _metadata() -> Any:
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    if metadata is None:
        raise NotCacheable(cause="AOTAutograd left no metadata")
    if context is not None and list(context.guards_context.aotautograd_guards):
        raise NotCacheable(cause="inputs are guarded against overlapping")
    return metadata


# constants


def _tensors(gm: GraphModule) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a graph module, in the order AOTAutograd puts them."""
    return [
        *gm.named_parameters(remove_duplicate=False),
        *gm.named_buffers(remove_duplicate=False),
    ]


def _describe(tensor: torch.Tensor, own: Mapping[int, str]) -> dict[str, Any]:
    """A constant as JSON: the name Dynamo's graph has it under, or its elements."""
    if id(tensor) in own:
        return {"attribute": own[id(tensor)]}
    if tensor.nbytes > _LARGEST or tensor.requires_grad or tensor.layout is not torch.strided:
        raise NotCacheable(cause="tracing made a constant too large to keep")
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": str(tensor.device),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "elements": base64.b64encode(tensor_bytes(tensor)).decode(),
    }


def _constant(row: Mapping[str, Any], gm: GraphModule) -> torch.Tensor:
    if "attribute" in row:
        return dict(_tensors(gm))[row["attribute"]]
    dtype = getattr(torch, row["dtype"])
    content = bytearray(base64.b64decode(row["elements"]))
    flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    made = torch.empty_strided(row["shape"], row["stride"], dtype=dtype, device=row["device"])
    return made.copy_(flat.reshape(row["shape"]))


# guards on symbolic sizes


def _sizes(gm: GraphModule) -> list[torch.SymInt]:
    values = (node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder"))
    return [value for value in values if isinstance(value, torch.SymInt)]


def _guards(gm: GraphModule) -> str:
    """What tracing assumed of the symbolic sizes, over those among the inputs, in order."""
    sizes, shapes = _sizes(gm), shape_environment()
    if not sizes or shapes is None:
        return ""
    return shapes.produce_guards_expression(sizes) or ""


def _hold(guards: str, gm: GraphModule) -> bool:
    """Whether the sizes at hand meet the guards; if so, Dynamo is made to guard them too."""
    shapes = shape_environment()
    if not guards:
        return True
    sizes = _sizes(gm)
    hints = [size.node.hint for size in sizes]
    if shapes is None or not shapes.evaluate_guards_expression(guards, hints):
        return False
    return bool(shapes.evaluate_guards_expression(guards, sizes))
