"""Masks that a module holds, for its attentions: their values are looked at when a graph is
compiled, and Dynamo compiles again once they are others. (What is written through ``.data`` counts
as no change, as autograd has it.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._dynamo.source import AttrSource
from torch._guards import CompileContext, TracingContext
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node

from iocompiler.graph.patterns import Pattern, pattern

_KEY = "pattern"
_REAL = "_iocompiler_stands_for"
_OFTEN = 3
"""A function compiled again so often has values that change: it is not compiled for them."""


def look(gm: GraphModule, inputs: Sequence[Any]) -> None:
    """Note on the placeholders of Dynamo's graph what the masks among them hold, under guards."""
    context = TracingContext.try_get()
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if context is None or transformed or _is_compiled_often():
        return
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=False):
        source = _module_source(node)
        found = None if source is None else _pattern(value)
        if found is not None:
            node.meta[_KEY] = found
            context.guards_context.dynamo_guards.add(source.make_guard(_guard(value, found)))


def held(node: Node) -> Pattern | None:
    """What a tensor of the graph is known to hold."""
    if node.op == "placeholder":
        found: Pattern | None = node.meta.get(_KEY)
        return found
    if node.op != "get_attr":
        return None
    if _KEY not in node.meta:
        node.meta[_KEY] = _pattern(getattr(node.graph.owning_module, str(node.target), None))
    return node.meta[_KEY]  # type: ignore[no-any-return]


def stand_for(fake: Tensor, real: Tensor) -> None:
    """Let a tensor without data hold what another does, until it is written."""
    setattr(fake, _REAL, (real, fake._version))


def _with_data(value: Any) -> Any:
    """The tensor that another stands for, or it itself."""
    real, version = getattr(value, _REAL, (value, None))
    return real if version is None or version == value._version else value


def _pattern(value: Any) -> Pattern | None:
    value = _with_data(value)
    if not _may_be_mask(value):
        return None
    with unset_fake_temporarily():
        return pattern(value)


def _is_compiled_often() -> bool:
    compilation = CompileContext.current_compile_id()
    return bool(compilation and (compilation.frame_compile_id or 0) > _OFTEN)


def _module_source(node: Node) -> Any:
    """Where Dynamo has an input from, if that is an attribute of a module and nothing writes it."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None or not source.guard_source.is_unspecialized_nn_module():
        return None
    written = any(
        user.op == "call_method" and str(user.target).endswith("_") and user.args[0] is node
        for user in node.users
    )
    return None if written else source


def _may_be_mask(value: Any) -> TypeGuard[Tensor]:
    plain = type(value) is Tensor and value.layout is torch.strided
    return plain and not value.requires_grad and not value.is_inference()


def _guard(value: Tensor, expected: Pattern) -> Callable[[Any, Any], None]:
    """Makes Dynamo check that the tensor is the one it was, unwritten, or one with its pattern."""
    seen: tuple[Callable[[], Any], int] = (weakref.ref(value), value._version)

    def unchanged(now: Any) -> bool:
        nonlocal seen
        if not _may_be_mask(_with_data(now)):
            return False
        if seen[0]() is not now or seen[1] != now._version:
            if _pattern(now) != expected:
                return False
            seen = (weakref.ref(now), now._version)
        return True

    def install(builder: Any, guard: Any) -> None:
        manager = builder.get_guard_manager(guard)
        manager.add_lambda_guard(unchanged, [f"{guard.name} holds the mask it held"], None)
        # torch 2.11 skips the guards of a tensor, as of what cannot change, while its module's
        # attributes are the same; not of one with attributes that are guarded
        version = AttrSource(guard.originating_source, "_version")
        builder.get_guard_manager_from_source(version)

    return install
