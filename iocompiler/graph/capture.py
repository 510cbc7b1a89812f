"""Dynamo's graph, traced again to pre-dispatch, pre-autograd ATen: where `layer_norm` and `softmax`
still stand whole.

The graph stays what the user wrote: in-place operators remain (`normalise` makes the simple ones
    functional), grad-mode and autocast switches are nodes, and higher-order operators (a
    checkpointed region, a condition) are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.fx.traceback
import torch.utils._pytree as pytree
from torch._guards import TracingContext, detect_fake_mode
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts, ShapeEnv
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from iocompiler.errors import CaptureFailed
from iocompiler.graph import view
from iocompiler.graph.autocast import autocast, region_entered
from iocompiler.graph.made_inside import make_inside

_DATA = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]
"""``x.data`` in Dynamo's graph: no operator, so that what it returns would be a constant."""


def capture(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Trace ``gm`` to pre-dispatch ATen; ``gm`` itself is left untouched.

    Args:
        gm: the graph Dynamo hands to a backend.
        example_inputs: one value a placeholder: tensors (real or fake), sizes (int or SymInt) or
            numbers.

    Returns:
        a graph with the same placeholders and outputs, fake tensors in ``meta["val"]`` and stack
        traces kept.

    Raises:
        CaptureFailed: the graph takes tensor subclasses, holds a transform of torch.func (whose
            levels a second trace would enter with fake tensors), or cannot be traced.
    """
    if any(is_traceable_wrapper_subclass(x) for x in example_inputs):
        raise CaptureFailed(cause="an input is a tensor subclass")
    if any(_transforms(node) for node in gm.graph.nodes):
        raise CaptureFailed(cause="it holds a transform of torch.func")
    mode = _fresh_mode(example_inputs)
    fakes = fake_inputs(example_inputs, mode)
    try:
        with (
            mode,
            torch.fx.traceback.preserve_node_meta(),
            torch._C.DisableTorchFunctionSubclass(),
            _unhooked(),
        ):
            traced = make_fx(_Retrace(gm).run, pre_dispatch=True, _allow_non_fake_inputs=True)(
                *fakes
            )
    except Exception as error:
        raise CaptureFailed(
            cause=f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    _copy_input_meta(gm, traced)
    for node in traced.graph.find_nodes(op="get_attr"):  # constants have a mode of make_fx's own
        if isinstance(getattr(traced, node.target, None), FakeTensor):
            # what is computed from inputs by no operator is no constant, and has no elements here
            raise CaptureFailed(cause=f"a value that was not traced is read by {_readers(node)}")
        if isinstance(view.value(node), torch.Tensor):
            with mode:
                node.meta["val"] = _like(view.value(node))
    for node in traced.graph.nodes:  # nobody reads it, and further traces copy all of it deeply
        node.meta.pop("from_node", None)
    traced.meta.update(gm.meta)
    traced._param_name_to_source = getattr(gm, "_param_name_to_source", {})  # type: ignore[assignment]
    _enter_checkpoints(traced)
    make_inside(traced)
    return traced


def _readers(node: Node) -> str:
    return ", ".join(dict.fromkeys(view.where(user) or user.name for user in node.users))


def _unhooked() -> AbstractContextManager[Any]:
    """A checkpoint around the program counts what is saved; tracing is not to be counted."""
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        return nullcontext()
    return saved_tensors_hooks(lambda x: x, lambda x: x)


def _transforms(node: Node) -> bool:
    """Whether the node enters or leaves a level of ``torch.func.grad``, ``vmap`` and their kin."""
    module = str(getattr(node.target, "__module__", ""))
    return node.op == "call_function" and "_functorch" in module and "nesting" in node.name


def fake_inputs(example_inputs: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
    """The inputs as fresh fake tensors of ``mode``, with the sizes Dynamo made symbolic."""
    context = TracingContext.try_get()
    return [_fake(x, mode, context) for x in example_inputs]


def _fake(x: Any, mode: FakeTensorMode, context: TracingContext | None) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    if isinstance(x, FakeTensor):
        # a fresh tensor: tracing may change its metadata in place, and the original must not see
        # that
        with mode, torch.no_grad():
            return x.detach()
    symbolic: Any = context.tensor_to_context.get(x) if context is not None else None  # type: ignore[no-untyped-call]
    return mode.from_tensor(
        x,
        static_shapes=symbolic is None,
        symbolic_context=symbolic,
        source=symbolic.tensor_source if symbolic is not None else None,
    )


def _fresh_mode(example_inputs: Sequence[Any]) -> FakeTensorMode:
    """A fake mode that shares only the symbols with the one AOTAutograd will use."""
    given = next((x.fake_mode for x in example_inputs if isinstance(x, FakeTensor)), None)
    if given is not None:
        return given
    outer = detect_fake_mode(example_inputs)
    shape_env = outer.shape_env if outer is not None else ShapeEnv()
    return FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)


def _copy_input_meta(gm: GraphModule, traced: GraphModule) -> None:
    # AOTAutograd reads from the placeholders where each input came from (which are parameters,
    # which alias)
    before, after = (g.graph.find_nodes(op="placeholder") for g in (gm, traced))
    for old, new in zip(before, after, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        kept = {key: item for key, item in old.meta.items() if key not in ("val", "example_value")}
        new.meta = {**kept, **new.meta}
        example = old.meta.get("example_value")
        if isinstance(example, torch.Tensor):
            new.meta["requires_grad"] = example.requires_grad
            new.meta["parameter"] = isinstance(example, torch.nn.Parameter)
        new.name = old.name
        new.target = old.target if isinstance(old.target, str) else old.name


def _enter_checkpoints(traced: GraphModule) -> None:
    """Capture what stands inside checkpointed regions too; one that cannot be is left as it is."""
    regions = view.regions(traced)
    for node, inner in view.checkpoints(traced):
        inputs = [view.value(read) if isinstance(read, Node) else read for read in node.args[1:]]
        try:
            with region_entered(regions[node]):
                setattr(traced, str(node.args[0].target), capture(inner, inputs))  # type: ignore[union-attr]
        except CaptureFailed:
            continue


class _Retrace(PropagateUnbackedSymInts):
    """Runs Dynamo's graph node by node while make_fx records what it calls."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self._outer: list[ExitStack] = []

    def run_node(self, n: Node) -> Any:
        self._node = n
        return super().run_node(n)

    def _tracer(self) -> Any:
        mode = get_proxy_mode()
        assert mode is not None, "called outside of make_fx"
        return mode.tracer

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        attribute = super().get_attr(target, args, kwargs)
        if not isinstance(attribute, torch.Tensor):
            return attribute
        tracer = self._tracer()
        name = str(target).replace(".", "_")
        setattr(tracer.root, name, attribute)
        with disable_proxy_modes_tracing():
            fake = _like(attribute)
        return track_tensor_tree(
            fake, tracer.create_proxy("get_attr", name, (), {}), constant=None, tracer=tracer
        )

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in (_enter_autocast, _exit_autocast):
            return self._switch_autocast(target, args)
        if target is _DATA:
            return self._data(*args)
        if not isinstance(target, HigherOrderOperator):
            return super().call_function(target, args, kwargs)
        return self._left_alone(target, args, kwargs)

    def _switch_autocast(self, target: Any, args: Any) -> Any:
        """Record the switch, and throw it: make_fx only records, and would trace wrong dtypes."""
        if target is _exit_autocast:
            self._outer.pop().close()
        else:
            self._outer.append(ExitStack())
            self._outer[-1].enter_context(autocast({args[0]: args[1] if args[2] else None}))
        return super().call_function(target, args, {})

    def _data(self, x: torch.Tensor) -> Any:
        """Record ``x.data`` as it stands: a write into it is none that autograd counts."""
        tracer = self._tracer()
        proxy = tracer.create_proxy("call_function", _DATA, (tracer.unwrap_proxy(x),), {})
        with disable_proxy_modes_tracing():
            shown = _DATA(x)
        return track_tensor_tree(shown, proxy, constant=None, tracer=tracer)

    def _left_alone(self, target: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
        """Record a higher-order operator as it stands, its submodules untouched; Dynamo knows what
        it returns.
        """
        tracer = self._tracer()
        for read in self._node.all_input_nodes:
            if read.op == "get_attr" and isinstance(self.env.get(read), torch.nn.Module):
                tracer.root.register_module(str(read.target).replace(".", "_"), self.env[read])
        proxies = pytree.tree_map(tracer.unwrap_proxy, (args, kwargs))
        proxy = tracer.create_proxy("call_function", target, *proxies)
        with disable_proxy_modes_tracing():
            known = self._node.meta.get("example_value")  # nothing of one that only writes
            result = pytree.tree_map_only(torch.Tensor, _like, known)
        return track_tensor_tree(result, proxy, constant=None, tracer=tracer)


def _like(x: torch.Tensor) -> torch.Tensor:
    """A new tensor of the current fake mode with the shape, strides, dtype and device of ``x``."""
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)
