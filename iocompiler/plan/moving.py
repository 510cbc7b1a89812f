"""What a step of a plan reads and overwrites, and how far behind its place it may run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from iocompiler.cost_model.call import resolve
from iocompiler.plan.contents import made, references
from iocompiler.plan.data import (
    AtenStep,
    BatchStep,
    ConstantStep,
    KernelStep,
    MatmulStep,
    Ref,
    Step,
    ViewStep,
)
from iocompiler.plan.overwriting import COPY, IN_PART

_OVERWRITING = frozenset(map(str, (COPY, *IN_PART, "iocompiler.embedding_gradient_.default")))
"""Calls that write into their first argument."""


class Moves:
    """Of the steps of one plan, which may run later than where they stand."""

    def __init__(self, steps: Sequence[Step]) -> None:
        bases = bases_of(steps)
        self._reads = [storages(names_read(step), bases) for step in steps]
        self._writes = [storages(written(step), bases) for step in steps]
        self._makes = [storages(set(made(step)), bases) for step in steps]

    def furthest(self, place: int, last: int) -> int:
        """The last place up to ``last`` for the step at ``place``: no step up to and at it touches
        what that writes or overwrites what it reads.
        """
        results = self._makes[place] | self._writes[place]
        used = self._reads[place] | results
        for after in range(place + 1, last + 1):
            if results & self._reads[after] or used & self._writes[after]:
                return after - 1
        return last


def bases_of(steps: Sequence[Step]) -> dict[str, str]:
    """Of each value that shows another's storage, that one: views, and what calls return of their
    argument (``aten.unfold``).
    """
    found: dict[str, str] = {}
    for step in steps:
        if isinstance(step, ViewStep):
            found[step.name] = step.base
        elif isinstance(step, AtenStep):
            found |= returned(step)
    return found


def returned(step: AtenStep) -> dict[str, str]:
    """The results of a call that share an argument's memory, by its schema, and that argument."""
    schema = getattr(resolve(step.target), "_schema", None)
    if schema is None or not any(each.alias_info is not None for each in schema.returns):
        return {}
    names = [argument.name for argument in schema.arguments]
    given = {**dict(zip(names, step.args, strict=False)), **dict(step.kwargs)}
    for argument in schema.arguments:
        value = given.get(argument.name)
        if argument.alias_info is not None and isinstance(value, Ref):
            return {name: value.name for _, name, _ in step.results()}
    return {}


def storages(names: set[str], bases: Mapping[str, str]) -> set[str]:
    """The values whose storage these show: a view stands for its base."""
    return {storage(name, bases) for name in names}


def storage(name: str, bases: Mapping[str, str]) -> str:
    """The value whose storage one shows."""
    while name in bases:
        name = bases[name]
    return name


def names_read(step: Step) -> set[str]:
    """The values a step reads (a view reads its base)."""
    if isinstance(step, (KernelStep, MatmulStep)):
        return set(step.args) - {name for name, _ in step.outputs}
    if isinstance(step, BatchStep):
        return {a for args, _ in step.members for a in args} - {name for name, _ in step.outputs}
    if isinstance(step, ViewStep):
        return {step.base}
    if isinstance(step, ConstantStep):
        return set()
    return {r.name for r in references((step.args, tuple(v for _, v in step.kwargs)))}


def written(step: Step) -> set[str]:
    """The values a step overwrites in place."""
    if isinstance(step, (KernelStep, MatmulStep)):
        fresh = {name for name, _ in step.outputs}
        pairs = zip(step.args, step.buffers, strict=True)
        return {a for a, b in pairs if b.role in ("out", "inout") and a not in fresh}
    if isinstance(step, BatchStep):
        fresh = {name for name, _ in step.outputs}
        roles = [b.role for b in step.program.buffers]
        return {
            name
            for args, _ in step.members
            for name, role in zip(args, roles, strict=True)
            if role in ("out", "inout") and name not in fresh
        }
    if isinstance(step, AtenStep) and step.target in _OVERWRITING:
        return {r.name for r in references(step.args[:1])}
    return set()
