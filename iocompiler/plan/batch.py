"""Equal small kernels over different tensors become one launch.

Each kernel pays a launch; an optimizer step has one for every parameter. Kernels that run one
flat program (`tile/flat.py`) are moved to the place of the last of them, where nothing in between
minds, and launched together; so are the second halves of split reductions (`plan/folds.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from iocompiler.cost_model.device import Device
from iocompiler.cost_model.schedule import choose
from iocompiler.plan.data import BatchStep, KernelStep, Step
from iocompiler.plan.folds import MOST_HELD, batch_folds
from iocompiler.plan.moving import Moves
from iocompiler.plan.sizes import value_at
from iocompiler.tile.flat import LENGTH, flat_program
from iocompiler.tile.index import Size
from iocompiler.tile.program import TileProgram

# Above this a launch is no longer what a kernel's time is made of.
_LARGE_POINTS = 1 << 26


def batch(
    steps: list[Step], device: Device, hints: Mapping[str, int], most: int = MOST_HELD
) -> list[Step]:
    """The same work in fewer launches; ``most`` bytes of partial results wait for them.

    Families that can move as a whole go first: what they leave behind no longer
    stands in the way of the others.
    """
    for whole in (True, False):
        changed = True
        while changed:
            changed, moves = False, Moves(steps)
            for program, members in _families(steps, hints).items():
                movable = _movable(moves, members)
                if len(movable) > 1 and (len(movable) == len(members) or not whole):
                    steps = _with_batch(steps, movable, program, device, hints)
                    changed = True
                    break
    return batch_folds(steps, device, hints, most)


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


def _movable(moves: Moves, members: list[tuple[int, Size]]) -> list[tuple[int, Size]]:
    """Members that may run with the last."""
    last = members[-1][0]
    return [(place, length) for place, length in members if moves.furthest(place, last) >= last]


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
