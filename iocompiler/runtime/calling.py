"""How a graph is called that this process compiles: by AOTAutograd's function at first, then by
ours.

AOTAutograd's function does for every graph what some need: aliases made again, subclasses taken
apart, effects put in order. A graph that has a `Convention` needs none of it, and is called as one
that was found in the cache, which costs the host less. The first call stays AOTAutograd's: it
checks operators then, and has the backward compiled when gradients first come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._guards import TracingContext
from torch.fx import GraphModule

from iocompiler.errors import NotCacheable
from iocompiler.graph.fingerprint import refuse_unusual
from iocompiler.runtime.autograd import Call, callable_of
from iocompiler.runtime.constants import tensors
from iocompiler.runtime.convention import Convention, read
from iocompiler.runtime.graph_key import refuse_surroundings
from iocompiler.runtime.tangents import Boxed, is_compiled_autograd


class Calling:
    """What is found out about the call of one graph while it is compiled.

    It is made where the graph is compiled: the modes of that moment count.

    Args:
        graph: what AOTAutograd is given, whose tensors become its first inputs.
        inputs: the others, real tensors and sizes.
    """

    def __init__(self, graph: GraphModule, inputs: Sequence[Any]) -> None:
        self._constants = [tensor for _, tensor in tensors(graph)]
        self._count = len(self._constants) + len(inputs)
        self._autocast = torch._C._is_any_autocast_enabled()
        self._forward: tuple[GraphModule, Any, Boxed] | None = None
        self._runs: tuple[Boxed, Boxed | None] | None = None
        self._convention: Convention | None = None
        self._refused: NotCacheable | None = None
        self._attempt(lambda: _refuse(inputs))

    def check(self) -> None:
        """Raise `NotCacheable` where it is known that there is no `Convention`."""
        if self._refused is not None:
            raise self._refused

    def convention(self) -> Convention:
        """Raises `NotCacheable` where there is none, or none yet."""
        self.check()
        if self._convention is None:
            raise NotCacheable(cause="its backward never came")
        return self._convention

    def inference(self, flat: GraphModule, run: Boxed) -> None:
        """Take note of a compiled graph without gradients."""
        self._attempt(lambda: self._settle(read(_metadata(), flat), run, None))

    def forward(self, flat: GraphModule, run: Boxed) -> None:
        """Of a forward, which is kept until its backward comes."""

        def note() -> None:
            self._forward = flat, _metadata(), run

        self._attempt(note)

    def backward(self, whole: GraphModule, run: Boxed) -> None:
        """Of its backward for all tangents, and of what runs that."""
        if self._forward is None:
            return
        flat, metadata, first = self._forward
        self._attempt(lambda: self._settle(read(metadata, flat, whole), first, run))
        self._forward = None

    def instead_of(self, theirs: Call) -> Call:
        """``theirs`` until the graph has run and all is known, then ours.

        Args:
            theirs: AOTAutograd's function. It also runs what compiled autograd traces, which reads
                its backward as a graph.
        """
        if self._refused is not None:
            return theirs
        ours: Call | None = None
        has_run = False

        def call(*inputs: Any) -> Sequence[Any]:
            nonlocal ours, has_run
            if ours is None and has_run:
                ours = self._made()
            if ours is not None and not is_compiled_autograd():
                return ours(*inputs)
            results = theirs(*inputs)
            has_run = True
            return results

        return call

    def _attempt(self, step: Callable[[], None]) -> None:
        if self._refused is not None:
            return
        try:
            step()
        except NotCacheable as error:
            self._refuse(error)
        except Exception as error:
            self._refuse(NotCacheable(cause=f"{type(error).__name__}: {error}"))

    def _refuse(self, error: NotCacheable) -> None:
        self._refused = error
        self._forward, self._constants = None, []

    def _settle(self, convention: Convention, forward: Boxed, backward: Boxed | None) -> None:
        if convention.inputs != self._count:
            raise NotCacheable(cause="its flat graph takes other inputs")
        self._convention, self._runs = convention, (forward, backward)

    def _made(self) -> Call | None:
        if self._runs is None:
            return None
        constants, autocast = self._constants, self._autocast
        return callable_of(self.convention(), *self._runs, constants, autocast)


def _refuse(inputs: Sequence[Any]) -> None:
    refuse_surroundings()
    for x in inputs:
        if isinstance(x, torch.Tensor):
            refuse_unusual(x)
        elif not isinstance(x, (torch.SymInt, int)) or isinstance(x, bool):
            raise NotCacheable(cause=f"an input is a {type(x).__name__}")


def _metadata() -> Any:
    """What AOTAutograd knows about the graph it is compiling."""
    context = TracingContext.try_get()
    if context is None or context.fw_metadata is None:
        raise NotCacheable(cause="AOTAutograd left no metadata")
    if list(context.guards_context.aotautograd_guards):
        raise NotCacheable(cause="its inputs are guarded against overlapping")
    return context.fw_metadata
