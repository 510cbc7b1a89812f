"""Calling a forward and a backward as they are, under a small autograd function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo import disable
from torch._functorch._aot_autograd import runtime_wrappers
from torch.autograd.function import FunctionMeta
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from iocompiler.runtime.convention import Convention, Tangent, Training
from iocompiler.runtime.tangents import Backward, Boxed, is_compiled_autograd

# what tells Dynamo which sizes of a result vary, for the graph that comes next
_DYNAMIC = (
    "_dynamo_propagated_dynamic_indices"
    if hasattr(runtime_wrappers, "mark_dynamo_propagated_dynamic_indices")
    else "_dynamo_weak_dynamic_indices"
)

Call = Callable[..., Sequence[Any]]
"""Called with a graph's inputs as arguments; returns its outputs."""


def callable_of(
    convention: Convention,
    forward: Boxed,
    backward: Boxed | None,
    constants: Sequence[Any],
    autocast: bool | None = None,
) -> Call:
    """What Dynamo calls.

    Args:
        convention: how the two are called; with ``training``, there is a ``backward``.
        constants: tensors that stand before the inputs.
        autocast: whether the graph was traced under autocast; None: whether that is on now.
    """
    if autocast is None:
        autocast = torch._C._is_any_autocast_enabled()
    training = convention.training
    if training is None or backward is None:
        run = _inference(_without_autocast(forward) if autocast else forward)
    else:
        run = _differentiable(convention, training, forward, backward, autocast)
    return _with_inputs(convention, run, tuple(constants))


def _with_inputs(convention: Convention, run: Call, constants: tuple[Any, ...]) -> Call:
    """The parts that no autograd sees: versions of overwritten inputs, inputs that are outputs,
    marks of dynamic sizes.
    """
    overwritten = convention.overwritten
    returned = [(at, o.source) for at, o in enumerate(convention.outputs) if o.source is not None]
    dynamic = [(at, set(o.dynamic)) for at, o in enumerate(convention.outputs) if o.dynamic]
    if not (overwritten or returned or dynamic):
        return (lambda *inputs: run(*constants, *inputs)) if constants else run

    def call(*inputs: Any) -> Sequence[Any]:
        args = (*constants, *inputs)
        if overwritten:
            torch.autograd.graph.increment_version([args[position] for position in overwritten])
        outputs = list(run(*args))
        for at, source in returned:
            outputs[at] = args[source]
        for at, sizes in dynamic:
            setattr(outputs[at], _DYNAMIC, getattr(outputs[at], _DYNAMIC, set()) | sizes)
        return outputs

    return call


def _inference(forward: Boxed) -> Call:
    def run(*args: Any) -> Sequence[Any]:
        if not torch.is_grad_enabled():
            return forward(list(args))  # type: ignore[no-any-return]
        torch._C._set_grad_enabled(False)
        try:
            return forward(list(args))  # type: ignore[no-any-return]
        finally:
            torch._C._set_grad_enabled(True)

    return run


def _without_autocast(run: Boxed) -> Boxed:
    """Autocast was traced into the graph; its operators are not to be cast again."""

    def outside(args: list[Any]) -> Any:
        with torch._C._DisableAutocast():
            return run(args)

    return outside


def _differentiable(
    convention: Convention, training: Training, forward: Boxed, backward: Boxed, autocast: bool
) -> Call:
    function: Any = _function(convention, training, forward, backward, autocast)
    # what `Function.apply` comes to where no transform of functorch is active, whose tensors
    # Dynamo's guards tell from plain ones
    plain, transformed = super(torch.autograd.Function, function).apply, function.apply
    detached = training.detached

    def run(*args: Any) -> Sequence[Any]:
        if detached:
            args = tuple(x.detach() if at in detached else x for at, x in enumerate(args))
        apply = transformed if torch._C._are_functorch_transforms_active() else plain
        if torch.is_grad_enabled():
            return apply(*args)  # type: ignore[no-any-return]
        with torch.enable_grad():  # the program does so itself, around a part, under no_grad
            return apply(*args)  # type: ignore[no-any-return]

    return run


def _not_traced(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled autograd would trace it, and does not know the modules that are called there."""
    made: Callable[..., Any] = disable(backward, reason="a backward is compiled already")  # type: ignore[no-untyped-call]
    return made


class _Boxing(FunctionMeta):
    """Of functions whose backward is handed its gradients in a list, so that each may be freed when
    it is dead; but compiled autograd has none of these.
    """

    @property
    def boxed_grads_call(self) -> bool:
        return not is_compiled_autograd()


def _function(
    convention: Convention, training: Training, forward: Boxed, backward: Boxed, autocast: bool
) -> type[torch.autograd.Function]:
    outputs = convention.outputs
    made = len(outputs)
    kept = made + training.checked + training.unchecked
    beside = bool(training.unchecked or training.sizes)
    fresh = [output.source is None for output in outputs]
    silent = [position for position, output in enumerate(outputs) if not output.differentiable]
    taken = [tangent.output for tangent in training.tangents]
    layouts = [_layout(tangent) for tangent in training.tangents]
    partial = backward if isinstance(backward, Backward) else None
    if autocast:
        forward, backward = _without_autocast(forward), _without_autocast(backward)

    class CompiledGraph(torch.autograd.Function, metaclass=_Boxing):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            results = forward(list(args))
            # autograd keeps the base of a saved view alive too; what is saved has no history
            saved = [x.detach() if x._is_view() else x for x in results[made:kept]]
            ctx.save_for_backward(*saved[: training.checked])
            if beside:
                ctx.beside = saved[training.checked :]
                ctx.sizes = results[kept:]
            if partial is not None:
                ctx.set_materialize_grads(is_compiled_autograd())
                if not partial.compiles:
                    ctx.kinds = [_kind(results[at]) for at in taken]
            found = [_unviewed(results[at]) if fresh[at] else None for at in range(made)]
            if silent:
                marked = [found[at] for at in silent if isinstance(found[at], torch.Tensor)]
                ctx.mark_non_differentiable(*marked)
                ctx._materialize_non_diff_grads = False
            return tuple(found)

        @staticmethod
        @_not_traced
        def backward(ctx: Any, *gradients: Any) -> Any:
            _check_backward(training)
            args = list(ctx.saved_tensors)
            if beside:
                args = [*ctx.sizes, *args, *ctx.beside]
            boxed = len(gradients) == 1 and type(gradients[0]) is list
            given = gradients[0] if boxed else list(gradients)
            del gradients
            came = [given[at] for at in taken]
            given.clear()
            if partial is not None and not partial.compiles:
                _complete(came, ctx.kinds, partial, len(args))
            args += [None if x is None else lay(x) for x, lay in zip(came, layouts, strict=True)]
            came.clear()
            if torch.is_grad_enabled():
                return _once(lambda: run(ctx, args), args)
            return run(ctx, args)

    def run(ctx: Any, args: list[Any]) -> tuple[Any, ...]:
        ctx.maybe_clear_saved_tensors()
        if beside and not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.beside = []
        return tuple(backward(args))

    return CompiledGraph


def _unviewed(x: Any) -> Any:
    """An output that autograd does not take for a view of something the caller never sees."""
    if isinstance(x, torch.Tensor) and x._is_view():
        return torch.ops.aten._unsafe_view(x, x.shape)
    return x


def _kind(x: torch.Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device


def _complete(
    given: list[torch.Tensor | None], kinds: Sequence[Any], backward: Backward, first: int
) -> None:
    """Zeros in place of what did not come and the backward cannot do without; the tangents start at
    its argument ``first``.
    """
    absent = tuple(first + at for at, gradient in enumerate(given) if gradient is None)
    for at in set(absent).difference(backward.nearest(absent)):
        shape, dtype, device = kinds[at - first]
        given[at - first] = torch.zeros(shape, dtype=dtype, device=device)


def _layout(tangent: Tangent) -> Callable[[torch.Tensor], torch.Tensor]:
    """What gives a gradient the strides the backward was compiled for."""
    size, stride = tangent.size, tangent.stride

    def formatted(x: torch.Tensor) -> torch.Tensor:
        if type(x) is not torch.Tensor:
            _refuse_subclass(x)
        return x.contiguous(memory_format=memory_format)

    def strided(x: torch.Tensor) -> torch.Tensor:
        if type(x) is not torch.Tensor:
            _refuse_subclass(x)
        if x.stride() == stride:
            return x
        return torch.empty_strided(size, stride, dtype=x.dtype, device=x.device).copy_(x)

    if not tangent.memory_format:
        return strided
    memory_format = getattr(torch, tangent.memory_format)
    return formatted


def _refuse_subclass(x: Any) -> None:
    """Raise where a gradient has no memory of its own: there is nothing to compute with."""
    if is_traceable_wrapper_subclass(x):
        raise RuntimeError(
            f"a backward compiled for gradients that are plain tensors was given a "
            f"{type(x).__name__}"
        )


def _check_backward(training: Training) -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError("a compiled backward cannot run inside of vmap, grad or vjp")
    if not training.deterministic and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(
            "this backward was compiled without deterministic algorithms, which are now asked for"
        )


def _once(run: Callable[[], tuple[Any, ...]], args: Sequence[Any]) -> Any:
    """Gradients that may be had (``create_graph=True``) but not differentiated.

    Args:
        args: what they are made of: whoever differentiates them by one of these is told.
    """

    class CompiledBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *connected: Any) -> Any:
            return run()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise RuntimeError(
                "a graph compiled by iocompiler cannot be differentiated twice, as torch.compile "
                "does not currently support double backward: compile without create_graph=True, or "
                "run this part uncompiled"
            )

    connected = torch.empty(0, requires_grad=True)  # where nothing else has a gradient
    return CompiledBackward.apply(connected, *args)  # type: ignore[no-untyped-call]
