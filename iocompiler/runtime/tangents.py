"""Gradients of results that nobody differentiates: not made of zeros, but left out.

A model that returns its loss and its logits is trained on the loss alone. Autograd would hand the
backward a tensor of zeros for the logits, as large as they are; told not to, it hands None, and the
backward is compiled for what does come.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context, copy_context
from typing import Any, TypeAlias

import torch
from torch._dynamo import compiled_autograd
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import BackwardCFunction
from torch.fx import GraphModule

from iocompiler.errors import LateGuard
from iocompiler.passes.absent import fold, symbols_within

Boxed: TypeAlias = Callable[[list[Any]], Any]
"""Called with one list of inputs, which it empties, so that an input dies as soon as it is dead."""
Absent: TypeAlias = tuple[int, ...]
"""Positions of the tangents that are None, among all arguments of the backward."""

FRESH = ("non_alias", "unsafe_view_alias", "custom_function_view")


class Backward:
    """A backward that is compiled once for each set of tangents that nobody supplies; usually there
    is one.

    Args:
        tangents: their positions among the arguments.
        compiled: makes what runs without the arguments at the positions given.
        known: what another process compiled; nothing is compiled here then.

    Attributes:
        compiles: whether it is compiled for each set that comes.
    """

    def __init__(
        self,
        tangents: Sequence[int],
        compiled: Callable[[Absent], Boxed],
        known: Mapping[Absent, Boxed] | None = None,
    ) -> None:
        self._tangents = tuple(tangents)
        self._compiled = compiled
        self.compiles = known is None
        self._runs = dict(known or {})

    def nearest(self, absent: Absent) -> Absent:
        """Of ``absent``, what a backward compiled before does without; the rest is to be zero."""
        fitting = [known for known in self._runs if set(known) <= set(absent)]
        return max(fitting, key=len, default=())

    def __call__(self, args: list[Any]) -> Any:
        absent = tuple(at for at in self._tangents if args[at] is None)
        run = self._runs.get(absent)
        if run is None:
            run = self._runs[absent] = self._compiled(absent)
        for at in reversed(absent):
            del args[at]
        return run(args)


def takers(metadata: Any) -> list[int]:
    """The results of the user's graph whose gradients its backward takes."""
    return [
        position
        for position, info in enumerate(metadata.output_info)
        if info.output_type.name in FRESH
        and issubclass(info.raw_type, torch.Tensor)
        and getattr(info, "requires_grad_for_backward", info.requires_grad)
    ]


def of(flat: GraphModule) -> tuple[int, ...]:
    """Positions of the tangents among the inputs of a backward graph, as AOTAutograd names them."""
    inputs = flat.graph.find_nodes(op="placeholder")
    return tuple(at for at, node in enumerate(inputs) if node.name.startswith("tangents"))


def optional(forward: GraphModule) -> list[int]:
    """A result made by the autograd node of the graph being compiled, if its backward may do
    without some of its tangents; none where it may not: there is only one, some are tensor
    subclasses, or nothing else tells their sizes.

    Args:
        forward: the flat forward graph, which returns what it saves last.
    """
    context = TracingContext.try_get()
    metadata: Any = context.fw_metadata if context is not None else None
    kinds = metadata.subclass_tangent_meta if metadata is not None else ()
    if len(kinds) < 2 or any(type(kind).__name__ != "PlainTensorMeta" for kind in kinds):
        return []
    (output,) = forward.graph.find_nodes(op="output")
    values = [getattr(node, "meta", {}).get("val") for node in output.args[0]]
    results, saved = values[: metadata.num_forward], values[metadata.num_forward :]
    known = symbols_within((x for x in results if isinstance(x, torch.Tensor)), saved)
    return takers(metadata)[:1] if known else []


def without(
    flat: GraphModule, inputs: Sequence[Any], absent: Absent
) -> tuple[GraphModule, list[Any]]:
    """A copy of a backward graph without the tangents ``absent``, and its fake inputs."""
    with unset_fake_temporarily():  # constants in it are real
        graph = copy.deepcopy(flat)
    fold(graph, absent)
    return graph, [each for at, each in enumerate(inputs) if at not in absent]


def keep_graphs() -> None:
    """AOTAutograd refuses ``retain_graph=True`` to a backward that may write over what was saved:
    those compiled here look at run time whether they may.
    """
    context = TracingContext.try_get()
    metadata: Any = context.fw_metadata if context is not None else None
    if metadata is not None and hasattr(metadata, "bw_donated_idxs"):
        metadata.bw_donated_idxs = []


def resumption() -> Callable[..., Any]:
    """A function that calls another, later and in any thread, as if it were called now; settings
    are those of the thread that asked for the gradients.
    """
    context = TracingContext.try_get()

    def resumed(function: Callable[..., Any], *args: Any) -> Any:
        with tracing(context), torch.no_grad(), torch._C._DisableAutocast():
            return _variables().run(function, *args)

    return resumed


def _variables() -> Context:
    """Autograd leaves those of the thread that called it for the threads of its devices."""
    stashed = torch._C._is_key_in_tls("context") and torch._C._get_obj_in_tls("context")
    # one that is entered already is not entered again
    return stashed.copy() if isinstance(stashed, Context) else copy_context()


@contextmanager
def no_new_guards() -> Iterator[None]:
    """Where Dynamo can no longer guard a graph: what assumes more of its sizes is an error."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    guards = mode.shape_env.guards if mode is not None and mode.shape_env is not None else []
    before = len(guards)
    yield
    if guards[before:]:
        raise LateGuard(guards=", ".join(str(guard.expr) for guard in guards[before:]))


def is_compiled_autograd() -> bool:
    """Whether compiled autograd takes the gradients of a graph that runs now. None of them may be
    None then: it traces what AOTAutograd made of the backward, which does without none.
    """
    return bool(getattr(compiled_autograd, "compiled_autograd_enabled", False))


def without_zeros(run: Callable[..., Any], optional: Sequence[int]) -> Callable[..., Any]:
    """``run``, the autograd node of whose results gets None, not zeros, where no gradient comes.

    Args:
        optional: what `optional` finds, once the forward is compiled.
    """

    def call(*args: Any) -> Any:
        results = run(*args)
        if optional and not is_compiled_autograd():
            for at in optional:
                node = results[at].grad_fn
                if isinstance(node, BackwardCFunction):
                    node.set_materialize_grads(False)
        return results

    return call
