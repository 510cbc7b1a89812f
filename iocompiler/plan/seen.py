"""Buffers get the shape they are seen in.

Kernels read and write addresses; only calls and the caller see a tensor's shape. Where these see a
kernel's result through views of the whole of it, and never as it is, it is made as one of these
views is: one tensor less to make at every call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch.utils._pytree import tree_map_only

from iocompiler.plan.contents import references
from iocompiler.plan.data import (
    Argument,
    AtenStep,
    BatchStep,
    KernelStep,
    Ref,
    Step,
    TensorSpec,
    ViewStep,
)
from iocompiler.plan.sizes import equal
from iocompiler.tile.index import product


def as_seen(
    steps: Sequence[Step], outputs: tuple[Argument, ...]
) -> tuple[list[Step], tuple[Argument, ...]]:
    """The steps and the outputs of a plan with one view less of each buffer that allows it."""
    seen, showing = _seen(steps, outputs), _views(steps)
    chosen: dict[str, ViewStep] = {}
    for step in steps:
        if isinstance(step, (KernelStep, BatchStep)):
            for name, spec in step.outputs:
                views = [v for v in showing.get(name, ()) if seen[v.name] and _is_whole(v, spec)]
                if views and not seen[name]:
                    chosen[name] = max(views, key=lambda view: seen[view.name])
    names = {view.name: name for name, view in chosen.items()}
    specs = {name: view.spec for name, view in chosen.items()}
    kept = [step for step in steps if not (isinstance(step, ViewStep) and step.name in names)]
    return [_renamed(step, names, specs) for step in kept], _arguments(outputs, names)


def _seen(steps: Sequence[Step], outputs: tuple[Argument, ...]) -> Counter[str]:
    """How often calls and the caller see each value."""
    found = Counter(ref.name for ref in references(outputs))
    for step in steps:
        if isinstance(step, AtenStep):
            found.update(ref.name for ref in references((step.args, dict(step.kwargs))))
    return found


def _views(steps: Sequence[Step]) -> dict[str, list[ViewStep]]:
    """The views of each value."""
    found: dict[str, list[ViewStep]] = {}
    for step in steps:
        if isinstance(step, ViewStep):
            found.setdefault(step.base, []).append(step)
    return found


def _is_whole(view: ViewStep, spec: TensorSpec) -> bool:
    """Whether a view has all elements of its base, each once, where they lie."""
    if view.spec.dtype != spec.dtype or not equal(view.offset, 0):
        return False
    if not equal(product(view.spec.shape), product(spec.shape)):
        return False
    return equal(view.spec.reach, spec.reach)


def _renamed(step: Step, names: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> Step:
    def of(name: str) -> str:
        return names.get(name, name)

    match step:
        case KernelStep():
            made = tuple((name, specs.get(name, spec)) for name, spec in step.outputs)
            return replace(step, args=tuple(map(of, step.args)), outputs=made)
        case BatchStep():
            made = tuple((name, specs.get(name, spec)) for name, spec in step.outputs)
            members = tuple((tuple(map(of, args)), length) for args, length in step.members)
            return replace(step, members=members, outputs=made)
        case ViewStep():
            return replace(step, base=of(step.base))
        case AtenStep():
            args, kwargs = _arguments((step.args, step.kwargs), names)
            return replace(step, args=args, kwargs=kwargs)
        case _:
            return step


def _arguments(given: tuple[Argument, ...], names: Mapping[str, str]) -> tuple[Argument, ...]:
    found: tuple[Argument, ...] = tree_map_only(
        Ref, lambda ref: Ref(names.get(ref.name, ref.name)), given
    )
    return found
