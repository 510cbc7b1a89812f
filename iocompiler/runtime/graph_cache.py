"""Whole graphs in the disk cache: a second process finds a graph's modules by its text and runs
them, with nothing traced, planned or compiled.

An entry (kind "graphs") holds the emitted modules, the text of its key and one JSON: how the
modules are called, the constants among their inputs, the guards that tracing laid on symbolic
sizes, and what the passes found. Under one key several entries may stand, told apart by their
guards.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule

from iocompiler.compilation import Compilation, Fallback
from iocompiler.errors import FallbackWarning, NotCacheable
from iocompiler.graph.findings import Miss, Rewrite
from iocompiler.graph.fingerprint import shape_environment
from iocompiler.options import Options
from iocompiler.pipeline import Pipeline
from iocompiler.recompute.trade import trade_of
from iocompiler.runtime import constants
from iocompiler.runtime.autograd import callable_of
from iocompiler.runtime.cache import Cache, Entry, default_cache, key_of
from iocompiler.runtime.calling import Calling
from iocompiler.runtime.convention import Convention
from iocompiler.runtime.graph_key import key_text
from iocompiler.runtime.graph_text import graph_of, graph_text
from iocompiler.runtime.tangents import Absent, Backward, Boxed

LoadText: TypeAlias = Callable[[str, str, str], Boxed]
"""``(text, name, device)`` to the function that runs it."""

_KIND = "graphs"
_KEY = "key.txt"
_GENERAL = "backward_aten.py"
_GUARDED = 8  # entries under one key


@dataclass
class Slot:
    """The place of one graph in the cache, while it is compiled.

    What it holds stays until the backward comes: no tensor of the caller's is among it.

    Attributes:
        cache: None where the graph is not kept; the compilation says why.
        text: what the key is the hash of.
        inputs: how many Dynamo's graph has. sizes: the symbolic ones among them.
        modules: (text, device) of each flat graph compiled so far.
        backwards: which tangents each backward among them does without.
        general: the whole backward as text, for tangents that no process had before.
    """

    compilation: Compilation
    load_text: LoadText | None
    cache: Cache | None = None
    text: str = ""
    inputs: int = 0
    sizes: list[torch.SymInt] = field(default_factory=list)
    constants: list[dict[str, Any]] = field(default_factory=list)
    modules: dict[str, tuple[str, str]] = field(default_factory=dict)
    backwards: dict[str, Absent] = field(default_factory=dict)
    general: str = ""
    key: str = ""

    def look(self, gm: GraphModule) -> Callable[..., Any] | None:
        """The function of an entry that fits, its findings added to the compilation; None where
        there is none.
        """
        for key in self._keys():
            assert self.cache is not None
            entry = self.cache.get(_KIND, key)
            if entry is None:
                return None
            try:
                if _hold(entry.meta["guards"], self.sizes):
                    self.key = key
                    return self._open(entry, gm)
            except Exception as error:  # whatever is wrong with it, it is made again
                self.cache.discard(_KIND, key, f"{type(error).__name__}: {error}")
                return None
        return None

    def lifted(self, graph: GraphModule, gm: GraphModule) -> None:
        """Take note of the tensors in the rewritten ``graph``, which become its first inputs."""
        if self.cache is not None:
            try:
                self.constants = constants.describe(graph, gm)
            except Exception as error:
                self.refuse(error)

    def add_forward(self, run: Boxed, calling: Calling) -> None:
        """Take a compiled forward in."""
        if self.cache is None:
            return
        self._keep("forward", run)
        try:
            calling.check()
        except Exception as error:
            self.refuse(error)

    def add_inference(self, run: Boxed, calling: Calling) -> None:
        """Take a compiled graph without gradients in, and write the entry."""
        if self.cache is None:
            return
        self._keep("inference", run)
        try:
            self._write(calling.convention())
        except Exception as error:
            self.refuse(error)

    def add_backward(
        self, whole: GraphModule, absent: Absent, run: Boxed, calling: Calling
    ) -> None:
        """Take a compiled backward in, and write the entry with it.

        Args:
            whole: the flat backward for all tangents.
            absent: those that ``run`` does without.
        """
        if self.cache is None:
            return
        name = f"backward_{len(self.backwards)}" if self.backwards else "backward"
        self._keep(name, run)
        self.backwards[name] = absent
        try:
            convention = calling.convention()
            if not self.general and len(convention.training.tangents) > 1:  # type: ignore[union-attr]
                self.general = graph_text(whole)
            self._write(convention)
        except Exception as error:
            self.refuse(error)

    def _keep(self, name: str, run: Boxed) -> None:
        module = getattr(run, "module", None)
        self.modules[name] = (getattr(run, "source", ""), str(getattr(module, "device", "")))

    def refuse(self, error: Exception) -> None:
        """The graph is not kept: it is compiled and runs as it would without a cache."""
        self.cache = None
        self.compilation.cache = f"not cached: {error or type(error).__name__}"

    def withdraw(self) -> None:
        """What was written is taken back: a part of it does not run as it was compiled."""
        if self.cache is not None:
            if self.key:
                self.cache.forget(_KIND, self.key)
            self.refuse(NotCacheable(cause="a part of it runs on aten"))

    def _keys(self) -> Iterator[str]:
        if self.cache is not None:
            key = key_of("graph", self.text)
            yield from (f"{key}-{number}" for number in range(_GUARDED))

    def _open(self, entry: Entry, gm: GraphModule) -> Callable[..., Any]:
        assert self.load_text is not None
        meta = entry.meta
        if entry.files[_KEY].decode() != self.text:
            raise ValueError("it was made for another graph")
        convention = Convention.from_json(meta["convention"])
        tensors = [constants.rebuild(row, gm) for row in meta["constants"]]
        if convention.inputs != len(tensors) + self.inputs:
            raise ValueError("it takes another number of inputs")
        loaded = {
            name: self.load_text(entry.files[f"{name}.py"].decode(), name, device)
            for name, device in meta["devices"].items()
        }
        forward = loaded["inference"] if convention.training is None else loaded["forward"]
        run = callable_of(convention, forward, self._backward(entry, convention, loaded), tensors)
        rewrites = [Rewrite(**row) for row in meta["rewrites"]]
        self.compilation.add([*rewrites, *(Miss(**row) for row in meta["misses"])])
        self.compilation.changed = int(meta["changed"])
        self.compilation.trade = meta["trade"] and trade_of(meta["trade"])
        self.compilation.cache = "found"
        return run

    def _backward(
        self, entry: Entry, convention: Convention, loaded: Mapping[str, Boxed]
    ) -> Boxed | None:
        training = convention.training
        if training is None:
            return None
        if len(training.tangents) < 2:
            return loaded["backward"]
        known = {tuple(absent): loaded[name] for name, absent in entry.meta["backwards"].items()}
        text = entry.files[_GENERAL].decode()
        first = training.sizes + training.checked + training.unchecked
        positions = range(first, first + len(training.tangents))
        return Backward(positions, lambda _: self._on_aten(text), known)

    def _on_aten(self, text: str) -> Boxed:
        """The backward for tangents it was never compiled for; the next process compiles it."""
        cause = "other results are differentiated than when the graph was compiled"
        self.compilation.fallbacks.append(Fallback("backward", cause))
        warnings.warn(
            f"iocompiler: backward found in the cache runs on aten in this process: {cause}",
            FallbackWarning,
            stacklevel=2,
        )
        if self.cache is not None:
            self.cache.forget(_KIND, self.key)
        return graph_of(text)

    def _write(self, convention: Convention) -> None:
        assert self.cache is not None
        done = self.compilation
        if done.fallbacks or not all(text for text, _ in self.modules.values()):
            raise NotCacheable(cause="a part of it runs on aten")
        meta = {
            "convention": convention.as_json(),
            "constants": self.constants,
            "guards": _guards(self.sizes),
            "backwards": self.backwards,
            "devices": {name: device for name, (_, device) in self.modules.items()},
            "rewrites": [dataclasses.asdict(found) for found in done.rewrites],
            "misses": [dataclasses.asdict(found) for found in done.misses],
            "changed": done.changed,
            "trade": done.trade and dataclasses.asdict(done.trade),
        }
        files = {f"{name}.py": text.encode() for name, (text, _) in self.modules.items()}
        files[_KEY] = self.text.encode()
        files[_GENERAL] = self.general.encode()
        if self.key:
            self.cache.forget(_KIND, self.key)  # written again, with one more backward
        self.key = self.key or self._free(meta)
        if self.cache.store(_KIND, self.key, files, meta) is not None:
            done.cache = "stored"

    def _free(self, meta: Mapping[str, Any]) -> str:
        """The first key without an entry, or with one that another process has just written for
        the same sizes, and which stays.
        """
        assert self.cache is not None
        for key in self._keys():
            entry = self.cache.get(_KIND, key)
            if entry is None or entry.meta.get("guards") == meta["guards"]:
                return key
        raise NotCacheable(cause="its sizes vary too much")


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
    place = Slot(compilation, load_text, inputs=len(inputs), sizes=_sizes(gm))
    try:
        if load_text is None:
            raise NotCacheable(cause="the engine keeps no text")
        place.text = key_text(gm, inputs, options, pipeline)
        place.cache = default_cache()
    except Exception as error:
        place.refuse(error)
    return place


def _sizes(gm: GraphModule) -> list[torch.SymInt]:
    values = (node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder"))
    return [value for value in values if isinstance(value, torch.SymInt)]


def _guards(sizes: Sequence[torch.SymInt]) -> str:
    """What tracing assumed of the symbolic sizes."""
    shapes = shape_environment()
    if not sizes or shapes is None:
        return ""
    return shapes.produce_guards_expression(sizes) or ""


def _hold(guards: str, sizes: Sequence[torch.SymInt]) -> bool:
    """Whether the sizes at hand meet the guards; if so, Dynamo is made to guard them too."""
    if not guards:
        return True
    shapes = shape_environment()
    hints = [size.node.hint for size in sizes]
    if shapes is None or not shapes.evaluate_guards_expression(guards, hints):
        return False
    return bool(shapes.evaluate_guards_expression(guards, sizes))
