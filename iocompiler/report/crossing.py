"""What crosses between a whole program and device memory: the tensors its bound counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from iocompiler.cost_model.call import call_of_step
from iocompiler.plan.data import (
    AtenStep,
    BatchStep,
    KernelStep,
    Plan,
    Ref,
    Step,
    TensorSpec,
    ViewStep,
)


def crossing(plans: Sequence[Plan]) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The tensors read from and left in memory by all parts together, those one hands to the next
    left out."""
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    for position, plan in enumerate(plans):
        earlier = {name for p in plans[:position] for name in _names(p)}
        later = {name for p in plans[position + 1 :] for name, _ in p.inputs}
        owners, specs = _owners(plan)
        read = {owners.get(name, name) for step in plan.steps for name in _read(step)}
        placeholders = {name for name, spec in plan.inputs if spec is not None}
        inputs += [specs[name] for name in placeholders & read - earlier]
        left = {
            owners.get(r.name, r.name)
            for r in plan.outputs
            if isinstance(r, Ref) and r.name not in later
        }
        written = {owners.get(name, name) for step in plan.steps for name in _overwritten(step)}
        outputs += [
            specs[name]
            for name in (left - placeholders) | (written & placeholders)
            if name in specs
        ]
    return inputs, outputs


def _names(plan: Plan) -> set[str]:
    """What a later graph may take from this one."""
    return {name for name, _ in plan.inputs} | {r.name for r in plan.outputs if isinstance(r, Ref)}


def _owners(plan: Plan) -> tuple[dict[str, str], dict[str, TensorSpec]]:
    """The value whose memory each view looks at, and every value's spec."""
    owners: dict[str, str] = {}
    specs = {name: spec for name, spec in plan.inputs if spec is not None}
    for step in plan.steps:
        specs |= made(step)
        if isinstance(step, ViewStep):
            owners[step.name] = owners.get(step.base, step.base)
    return owners, specs


def _read(step: Step) -> set[str]:
    if isinstance(step, AtenStep):
        skipped = step.args[:1] if step.target.startswith("aten.copy_.") else ()
        return refs(step.args[len(skipped) :]) | refs(tuple(v for _, v in step.kwargs))
    return _buffers(step, ("in", "inout", "scalar"))


def _overwritten(step: Step) -> set[str]:
    """Values written into beside those a step makes."""
    if isinstance(step, AtenStep):
        return {o.name for o in call_of_step(step, _Anything()).mutated}
    return _buffers(step, ("out", "inout")) - set(made(step))


def _buffers(step: Step, roles: tuple[str, ...]) -> set[str]:
    if isinstance(step, KernelStep):
        members: tuple[tuple[str, ...], ...] = (step.args,)
    elif isinstance(step, BatchStep):
        members = tuple(args for args, _ in step.members)
    else:
        return set()
    buffers = step.program.buffers
    return {
        name for args in members for name, b in zip(args, buffers, strict=True) if b.role in roles
    }


class _Anything(dict[str, TensorSpec]):
    """Knows every name: where only which tensors a call names matters, not their specs."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> TensorSpec:
        return TensorSpec((), (), torch.float32, "cpu")


def refs(value: object) -> set[str]:
    """The names of all values in a step's arguments."""
    if isinstance(value, Ref):
        return {value.name}
    if isinstance(value, (tuple, list)):
        return {name for item in value for name in refs(item)}
    return set()


def made(step: Step) -> dict[str, TensorSpec]:
    """The specs of the values a step makes."""
    if isinstance(step, (KernelStep, BatchStep)):
        return dict(step.outputs)
    if isinstance(step, AtenStep):
        return {name: spec for name, spec in step.outputs if name is not None and spec is not None}
    return {step.name: step.spec}
