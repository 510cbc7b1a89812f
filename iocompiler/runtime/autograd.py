"""Calling a forward and a backward that were loaded, not traced: a small autograd function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch._functorch._aot_autograd import runtime_wrappers

from iocompiler.runtime.convention import Convention, Tangent, Training
from iocompiler.runtime.tangents import Backward, Boxed, may_be_none

# what tells Dynamo which sizes of a result vary, for the graph that comes next
_DYNAMIC = (
    "_dynamo_propagated_dynamic_indices"
    if hasattr(runtime_wrappers, "mark_dynamo_propagated_dynamic_indices")
    else "_dynamo_weak_dynamic_indices"
)


def callable_of(
    convention: Convention, forward: Boxed, backward: Boxed | None, constants: Sequence[Any]
) -> Callable[..., list[Any]]:
    """What Dynamo calls: the graph's inputs as arguments, its outputs in a list.

    Args:
        convention: how the two are called; with ``training``, there is a ``backward``.
        constants: tensors that stand before the inputs.
    """
    training = convention.training
    if training is None or backward is None:
        run = _inference(forward)
    else:
        run = _differentiable(convention, training, forward, backward)
    if torch._C._is_any_autocast_enabled():
        run = _without_autocast(run)
    return _with_inputs(convention, run, tuple(constants))


def _with_inputs(
    convention: Convention, run: Callable[[list[Any]], Any], constants: tuple[Any, ...]
) -> Callable[..., list[Any]]:
    """The parts that no autograd sees: versions of overwritten inputs, inputs that are outputs,
    marks of dynamic sizes.
    """
    overwritten = convention.overwritten
    returned = [(at, o.source) for at, o in enumerate(convention.outputs) if o.source is not None]
    dynamic = [(at, set(o.dynamic)) for at, o in enumerate(convention.outputs) if o.dynamic]

    def call(*inputs: Any) -> list[Any]:
        args = [*constants, *inputs]
        del inputs
        kept = [(at, args[source]) for at, source in returned]
        if overwritten:
            torch.autograd.graph.increment_version([args[position] for position in overwritten])
        outputs = list(run(args))
        for at, tensor in kept:
            outputs[at] = tensor
        for at, sizes in dynamic:
            setattr(outputs[at], _DYNAMIC, getattr(outputs[at], _DYNAMIC, set()) | sizes)
        return outputs

    return call


def _inference(forward: Boxed) -> Boxed:
    def run(args: list[Any]) -> Any:
        if not torch.is_grad_enabled():
            return forward(args)
        torch._C._set_grad_enabled(False)
        try:
            return forward(args)
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
    convention: Convention, training: Training, forward: Boxed, backward: Boxed
) -> Boxed:
    function: Any = _function(convention, training, forward, backward)
    apply = function.apply

    def run(args: list[Any]) -> Any:
        for position in training.detached:
            args[position] = args[position].detach()
        taken = tuple(args)
        args.clear()
        with torch.enable_grad():  # the program may do so itself, around a part, under no_grad
            return apply(*taken)

    return run


def _function(
    convention: Convention, training: Training, forward: Boxed, backward: Boxed
) -> type[torch.autograd.Function]:
    outputs = convention.outputs
    made = len(outputs)
    checked = made + training.checked
    unchecked = checked + training.unchecked
    amp: Any = torch._C._DisableAutocast if torch._C._is_any_autocast_enabled() else nullcontext
    silent = [position for position, output in enumerate(outputs) if not output.differentiable]
    tangents = training.tangents
    partial = backward if isinstance(backward, Backward) else None

    class CompiledGraph(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            results = forward(list(args))
            ctx.save_for_backward(*map(_plain, results[made:checked]))
            ctx.unchecked = list(map(_plain, results[checked:unchecked]))
            ctx.sizes = results[unchecked:]
            found = [
                _unviewed(result) if output.source is None else None
                for result, output in zip(results, outputs, strict=False)
            ]
            ctx.mark_non_differentiable(
                *(found[p] for p in silent if isinstance(found[p], torch.Tensor))
            )
            ctx._materialize_non_diff_grads = False
            if partial is not None:
                ctx.set_materialize_grads(not may_be_none())
                ctx.kinds = [_kind(results[t.output]) for t in tangents]
            return tuple(found)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            _check_backward(training)
            args = [*ctx.sizes, *ctx.saved_tensors, *ctx.unchecked]
            given = [gradients[t.output] for t in tangents]
            del gradients
            if partial is not None:
                _complete(given, ctx.kinds, partial, len(args))
            for tangent in tangents:
                gradient = given.pop(0)
                args.append(None if gradient is None else _laid_out(gradient, tangent))

            def run() -> tuple[Any, ...]:
                ctx.maybe_clear_saved_tensors()
                with amp():
                    return tuple(backward(args))

            return _once(run) if torch.is_grad_enabled() else run()

    return CompiledGraph


def _plain(x: torch.Tensor) -> torch.Tensor:
    """Autograd keeps the base of a saved view alive too; what is saved here has no history."""
    return x.detach() if x._is_view() else x


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


def _laid_out(x: torch.Tensor, tangent: Tangent) -> torch.Tensor:
    """A gradient with the strides the backward was compiled for."""
    if tangent.memory_format:
        return x.contiguous(memory_format=getattr(torch, tangent.memory_format))
    if x.stride() == tangent.stride:
        return x
    made = torch.empty_strided(tangent.size, tangent.stride, dtype=x.dtype, device=x.device)
    return made.copy_(x)


def _check_backward(training: Training) -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError("a compiled backward cannot run inside of vmap, grad or vjp")
    if not training.deterministic and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(
            "this backward was compiled without deterministic algorithms, which are now asked for"
        )


def _once(run: Callable[[], tuple[Any, ...]]) -> Any:
    """Gradients that may be had (``create_graph=True``) but not differentiated."""

    class CompiledBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, connected: torch.Tensor) -> Any:
            return run()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise RuntimeError(
                "a graph compiled by iocompiler cannot be differentiated twice: compile without "
                "create_graph=True, or run this part uncompiled"
            )

    return CompiledBackward.apply(torch.empty(0, requires_grad=True))  # type: ignore[no-untyped-call]
