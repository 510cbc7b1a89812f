"""CUDA graphs for mode="reduce-overhead", by torch's own trees of graphs
(`torch._inductor.cudagraph_trees`).

The trees own one memory pool for forward and backward graphs, know which outputs are still alive,
copy only inputs that move, and honour `torch.compiler.cudagraph_mark_step_begin`. They take any
boxed function, so ours goes in as it is: `cudagraphify_impl` has had the same arguments from torch
2.11 to 2.13. Inputs of "static" position (parameters, buffers, and what a recorded forward hands to
its backward) are read in place.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from iocompiler.codegen.values import Values
from iocompiler.plan.contents import all_steps, made, references
from iocompiler.plan.data import (
    AtenStep,
    BatchStep,
    ConstantStep,
    KernelStep,
    MatmulStep,
    Plan,
    ViewStep,
)
from iocompiler.runtime import kept
from iocompiler.runtime.reference import operator_named

_CHECK = "aten._linalg_check_errors.default"
_COPIED = 64
"""An output is copied where it has at most this fraction of the bytes its graph makes."""

Call = Callable[[list[Any]], list[Any]]


def obstacle(plan: Plan, static_inputs: Sequence[int]) -> str:
    """Why the plan cannot be recorded as a CUDA graph, or "" where it can."""
    if torch.device(plan.device).type != "cuda":
        return f"it runs on {plan.device}"
    for name, spec in plan.inputs:
        if spec is not None and torch.device(spec.device).type != "cuda":
            return f"input {name} is on {spec.device}"
    for step in plan.steps:
        if isinstance(step, AtenStep):
            reason = _waits(step)
            if reason:
                return reason
    for position in mutated_inputs(plan):
        if position not in static_inputs:
            # the recorded graph would write into its own copy of the input
            name = plan.inputs[position][0]
            return f"input {name} is written in place and is no parameter or buffer"
    return ""


def _waits(step: AtenStep) -> str:
    """Why the host has to wait for this call, or work on its result."""
    if step.target.startswith("higher_order."):
        return f"{step.target} decides on the host what runs"
    if step.target == _CHECK:
        return f"{step.target} reads what went wrong"
    tags = getattr(operator_named(step.target), "tags", ())
    for tag in (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape):
        if tag in tags:
            return f"{step.target} hands a value or a shape to the host"
    for name, spec in step.outputs:
        if spec is not None and torch.device(spec.device).type != "cuda":
            return f"{name} of {step.target} is on {spec.device}"
    return ""


def mutated_inputs(plan: Plan) -> tuple[int, ...]:
    """Positions of the inputs whose storage a step of the plan writes."""
    values = Values(plan)
    written: set[str] = set()
    for step in plan.steps:
        if isinstance(step, (KernelStep, MatmulStep)):
            roles = zip(step.buffers, step.args, strict=True)
            written |= {name for buffer, name in roles if buffer.role in ("out", "inout")}
        elif isinstance(step, BatchStep):
            for args, _ in step.members:
                roles = zip(step.program.buffers, args, strict=True)
                written |= {name for buffer, name in roles if buffer.role in ("out", "inout")}
        elif isinstance(step, AtenStep):
            written |= _written_by(step)
    roots = {values.place(name).root for name in written}
    return tuple(i for i, (name, _) in enumerate(plan.inputs) if name in roots)


def _written_by(step: AtenStep) -> set[str]:
    """Names of the values the operator's schema says it writes."""
    schema = getattr(operator_named(step.target), "_schema", None)
    given = dict(step.kwargs)
    found: set[str] = set()
    for position, argument in enumerate(schema.arguments if schema else ()):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = step.args[position] if position < len(step.args) else given.get(argument.name)
        found |= {ref.name for ref in references(value)}
    return found


def bytes_made(plan: Plan) -> int:
    """Bytes of what kernels and calls of a plan make, of symbolic sizes none."""
    steps = [s for s in all_steps(plan) if not isinstance(s, (ViewStep, ConstantStep))]
    specs = [spec for step in steps for spec in made(step).values()]
    return sum(
        math.prod(map(int, spec.shape)) * spec.dtype.itemsize
        for spec in specs
        if all(isinstance(size, int) for size in spec.shape)
    )


def record(
    call: Call,
    plan: Plan,
    device_index: int,
    *,
    static_inputs: Sequence[int] = (),
    returned: int = 0,
    is_backward: bool = False,
    is_inference: bool = False,
) -> Call:
    """``call`` as a function that records a CUDA graph on its first calls and replays it after
    that.

    ``static_inputs`` are positions of tensors that never move (parameters and buffers). Sizes among
    the arguments are keys: each set of them has its own graph. The first ``returned`` outputs are
    the caller's, who may keep them (`runtime.kept`). The plan must have no `obstacle`.
    """
    from torch._inductor import cudagraph_trees

    module = getattr(call, "module", None)
    if module is not None:
        module.recorded()
    settings = _settings(plan, device_index, is_backward, is_inference)
    graphed = _graphed(call, tuple(static_inputs), settings)
    held, little = kept.on_device(device_index), bytes_made(plan) // _COPIED
    watched: weakref.ref[Any] | None = None  # the first of the parameters

    def begin() -> None:
        manager = cudagraph_trees.get_manager(device_index, create_if_none_exists=False)
        if manager is not None and manager.can_start_new_generation():
            held.move()

    def forward(args: list[Any]) -> list[Any]:
        nonlocal watched
        begin()
        if static_inputs:
            first = args[static_inputs[0]]
            if watched is None or watched() is not first:
                watched = weakref.ref(first)
                held.watch(args[i] for i in static_inputs)
        return held.hand_out(graphed(args), returned, little)

    def backward(args: list[Any]) -> list[Any]:
        begin()
        outputs = graphed(args)
        held.gradients(outputs)
        return outputs

    return _boxed(backward if is_backward else forward)


def _settings(
    plan: Plan, device_index: int, is_backward: bool, is_inference: bool
) -> dict[str, Any]:
    """What the trees are told of a graph, as far as this torch's ask for it."""
    from torch._inductor import cudagraph_trees
    from torch._inductor.cudagraph_utils import PlaceholderInfo

    settings: dict[str, Any] = {
        "device_index": device_index,
        "is_backward": is_backward,
        "is_inference": is_inference,
        "stack_traces": [None] * len(plan.outputs),
        "constants": (),
        "placeholders": tuple(PlaceholderInfo(name, None, [], None) for name, _ in plan.inputs),
        "mutated_input_idxs": mutated_inputs(plan),
        "compile_id": None,
    }
    known = inspect.signature(cudagraph_trees.cudagraphify).parameters
    return {key: value for key, value in settings.items() if key in known}


def _graphed(call: Call, static_inputs: tuple[int, ...], settings: dict[str, Any]) -> Call:
    """By the trees, from the first call on: they want its arguments."""
    from torch._inductor import cudagraph_trees

    found: list[Call] = []

    def run(args: list[Any]) -> list[Any]:
        if not found:
            graphed = cudagraph_trees.cudagraphify_impl(call, args, static_inputs, **settings)
            found.append(graphed)
        return found[0](args)

    return run


def _boxed(call: Call) -> Call:
    """Marked as one that empties the list it is given."""
    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def plain_backward(call: Call, device_index: int) -> Call:
    """A backward that is not recorded though its forward is: the trees are told that the backward
    has begun.
    """
    from torch._inductor import cudagraph_trees

    def run(args: list[Any]) -> list[Any]:
        manager = cudagraph_trees.get_manager(device_index, create_if_none_exists=False)
        if manager is not None:
            manager.set_to_running_backward()
        return call(args)

    return _boxed(run)
