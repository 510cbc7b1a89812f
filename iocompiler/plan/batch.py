"""Equal small kernels over different tensors become one launch.

Each kernel pays a launch; an optimizer step has one for every parameter. Kernels that run one
flat program (`tile/flat.py`) are moved to the place of the last of them, where nothing in between
minds, and launched together.
"""

from __future__ import annotations

from collections.abc import Mapping

from iocompiler.cost_model.device import Device
from iocompiler.cost_model.schedule import choose
from iocompiler.plan.data import (
    AtenStep,
    BatchStep,
    ConstantStep,
    KernelStep,
    MatmulStep,
    Step,
    ViewStep,
    references,
)
from iocompiler.plan.sizes import value_at
from iocompiler.tile.flat import LENGTH, flat_program
from iocompiler.tile.index import Size
from iocompiler.tile.program import TileProgram

# Above this a launch is no longer what a kernel's time is made of.
_LARGE_POINTS = 1 << 26


def batch(steps: list[Step], device: Device, hints: Mapping[str, int]) -> list[Step]:
    """The same work in fewer launches.

    Families that can move as a whole go first: what they leave behind no longer
    stands in the way of the others.
    """
    for whole in (True, False):
        changed = True
        while changed:
            changed = False
            for program, members in _families(steps, hints).items():
                movable = _movable(steps, members)
                if len(movable) > 1 and (len(movable) == len(members) or not whole):
                    steps = _with_batch(steps, movable, program, device, hints)
                    changed = True
                    break
    return steps


def _families(
    steps: list[Step], hints: Mapping[str, int]
) -> dict[TileProgram, list[tuple[int, Size]]]:
    """Places and lengths of the kernels that run each flat program more than once."""
    families: dict[TileProgram, list[tuple[int, Size]]] = {}
    for place, step in enumerate(steps):
        if not isinstance(step, KernelStep):
            continue
        flat = flat_program(step.program)
        if flat is not None and value_at(flat[1], hints) <= _LARGE_POINTS:
            families.setdefault(flat[0], []).append((place, flat[1]))
    return {program: members for program, members in families.items() if len(members) > 1}


def _with_batch(
    steps: list[Step],
    members: list[tuple[int, Size]],
    program: TileProgram,
    device: Device,
    hints: Mapping[str, int],
) -> list[Step]:
    result: dict[int, Step] = dict(enumerate(steps))
    for place, _ in members:
        del result[place]
    result[members[-1][0]] = _launch_together(steps, members, program, device, hints)
    return [result[place] for place in sorted(result)]


def _movable(steps: list[Step], members: list[tuple[int, Size]]) -> list[tuple[int, Size]]:
    """Members that may run with the last: nothing up to it touches what they write or read."""
    last = members[-1][0]
    bases = {step.name: step.base for step in steps if isinstance(step, ViewStep)}
    kept = []
    for place, length in members:
        step = steps[place]
        assert isinstance(step, KernelStep)
        made = storages({name for name, _ in step.outputs} | written(step), bases)
        used = storages(set(step.args), bases)
        after = steps[place + 1 : last + 1]  # the last one too: it may need this one's result
        if not any(
            made & storages(names_read(s), bases) or used & storages(written(s), bases)
            for s in after
        ):
            kept.append((place, length))
    return kept


def storages(names: set[str], bases: Mapping[str, str]) -> set[str]:
    """The values whose storage these show: a view stands for its base."""
    found = set()
    for name in names:
        while name in bases:
            name = bases[name]
        found.add(name)
    return found


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
    if isinstance(step, AtenStep) and step.target == "aten.copy_.default":
        return {r.name for r in references(step.args[:1])}
    return set()


def _launch_together(
    steps: list[Step],
    members: list[tuple[int, Size]],
    program: TileProgram,
    device: Device,
    hints: Mapping[str, int],
) -> BatchStep:
    kernels = [
        step for step in (steps[place] for place, _ in members) if isinstance(step, KernelStep)
    ]
    total = sum(value_at(length, hints) for _, length in members)
    schedule = choose(program, device, {**hints, LENGTH.name: total})
    return BatchStep(
        f"{kernels[0].name}_x{len(kernels)}",
        program,
        schedule,
        tuple((k.args, length) for k, (_, length) in zip(kernels, members, strict=True)),
        tuple(output for k in kernels for output in k.outputs),
        tuple(node for k in kernels for node in k.nodes),
        tuple(dict.fromkeys(line for k in kernels for line in k.where)),
    )
