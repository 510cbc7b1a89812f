"""Second halves of reductions launched together.

A column sum leaves rows of partial results, which a small kernel folds (`plan/finish.py`): a
backward has one for every bias and every norm, and each takes longer to launch than to run. Their
results are mostly gradients that nobody reads before the end, so they may run later, together.
Until then their partial rows stay in memory: `most_held` bytes of them at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from iocompiler.cost_model.device import Device
from iocompiler.cost_model.schedule import choose
from iocompiler.plan.data import BatchStep, KernelStep, Step, TensorSpec
from iocompiler.plan.moving import Moves
from iocompiler.plan.peak import storage_bytes
from iocompiler.plan.sizes import value_at
from iocompiler.tile.flat import LENGTH, PARTS, Fold, folds, without
from iocompiler.tile.program import TileProgram

MOST_HELD = 1 << 25
"""Bytes of partial results that wait, at most: they fit the L2 of a large device."""
SHARE = 32
"""The part of what a graph is handed (saved tensors, parameters) that may wait beside it."""


def most_held(inputs: Iterable[tuple[str, TensorSpec | None]], hints: Mapping[str, int]) -> int:
    """Bytes of partial results that may wait in a graph with these inputs; they add no more than
    this to its peak.
    """
    given = sum(storage_bytes(spec, hints) for _, spec in inputs if spec is not None)
    return min(MOST_HELD, given // SHARE)


@dataclass(frozen=True)
class _Member:
    """A step at ``place`` and those of its folds that run one program: all of them if ``whole``."""

    place: int
    step: KernelStep
    folds: tuple[Fold, ...]
    whole: bool
    bytes: int


def batch_folds(
    steps: list[Step], device: Device, hints: Mapping[str, int], most: int
) -> list[Step]:
    """The same work in fewer launches: folds of one program run where the last of them stands;
    ``most`` bytes of partial results wait at once.
    """
    families = _families(steps, hints, most).values()
    several = [members for members in families if sum(member.whole for member in members) > 1]
    most //= max(1, len(several))  # each program's may wait at the same time
    changed = True
    while changed:
        changed = False
        moves = Moves(steps)
        for program, members in _families(steps, hints, most).items():
            chosen = _together(members, moves, most)
            if chosen:
                steps = _batched(steps, chosen, program, device, hints)
                changed = True
                break
    return steps


def _families(
    steps: list[Step], hints: Mapping[str, int], most: int
) -> dict[TileProgram, list[_Member]]:
    """The steps that run each folding program."""
    families: dict[TileProgram, list[_Member]] = {}
    for place, step in enumerate(steps):
        found = folds(step.program) if isinstance(step, KernelStep) else ()
        for program in dict.fromkeys(fold.program for fold in found):
            assert isinstance(step, KernelStep)
            mine = tuple(fold for fold in found if fold.program == program)
            held = sum(_held(fold, hints) for fold in mine)
            if held <= most:
                member = _Member(place, step, mine, len(mine) == len(found), held)
                families.setdefault(program, []).append(member)
    return families


def _held(fold: Fold, hints: Mapping[str, int]) -> int:
    """The bytes of partial results a fold reads."""
    size = value_at(fold.length * fold.parts, hints)
    rows = [b for b in fold.program.buffers if b.elements == LENGTH * PARTS]
    return size * sum(b.dtype.itemsize for b in rows)


def _together(members: list[_Member], moves: Moves, most: int) -> list[_Member]:
    """Members to be launched together, two of which at least are launched no more; none where
    there are no such.
    """
    reach = [moves.furthest(member.place, members[-1].place) for member in members]
    for end in range(len(members), 1, -1):
        last = members[end - 1].place
        movable = [m for m, far in zip(members[:end], reach, strict=False) if far >= last]
        for start in range(len(movable) - 1):
            chosen = _within_bound(movable[start:], most)
            if sum(member.whole for member in chosen) > 1:
                return chosen
    return []


def _within_bound(members: list[_Member], most: int) -> list[_Member]:
    """The first members, as many as may be held."""
    total, chosen = 0, []
    for member in members:
        total += member.bytes
        if total > most:
            break
        chosen.append(member)
    return chosen


def _batched(
    steps: list[Step],
    members: list[_Member],
    program: TileProgram,
    device: Device,
    hints: Mapping[str, int],
) -> list[Step]:
    result: dict[int, list[Step]] = {place: [step] for place, step in enumerate(steps)}
    for member in members:
        result[member.place] = [] if member.whole else [_rest(member, device, hints)]
    result[members[-1].place].append(_launch(members, program, device, hints))
    return [step for place in sorted(result) for step in result[place]]


def _rest(member: _Member, device: Device, hints: Mapping[str, int]) -> KernelStep:
    """The step without the folds that are launched elsewhere."""
    step = member.step
    program = without(step.program, tuple(s for fold in member.folds for s in fold.stores))
    names = dict(zip([b.name for b in step.program.buffers], step.args, strict=True))
    args = tuple(names[b.name] for b in program.buffers)
    outputs = tuple(output for output in step.outputs if output[0] in args)
    schedule = choose(program, device, hints)
    return replace(step, program=program, schedule=schedule, args=args, outputs=outputs)


def _launch(
    members: list[_Member], program: TileProgram, device: Device, hints: Mapping[str, int]
) -> BatchStep:
    rows = [(member.step, fold) for member in members for fold in member.folds]
    length = sum(value_at(fold.length, hints) for _, fold in rows)
    deepest = max(value_at(fold.parts, hints) for _, fold in rows)
    schedule = choose(program, device, {**hints, LENGTH.name: length, PARTS.name: deepest})
    arguments = []
    for step, fold in rows:
        names = dict(zip([b.name for b in step.program.buffers], step.args, strict=True))
        arguments.append(tuple(names[name] for name in fold.buffers))
    taken = {name for args in arguments for name in args}
    return BatchStep(
        f"{members[0].step.name}_x{len(members)}",
        program,
        schedule,
        tuple((args, fold.length) for args, (_, fold) in zip(arguments, rows, strict=True)),
        tuple(o for member in members for o in member.step.outputs if o[0] in taken),
        tuple(node for member in members for node in member.step.nodes),
        tuple(dict.fromkeys(line for member in members for line in member.step.where)),
        tuple(fold.parts for _, fold in rows),
    )
