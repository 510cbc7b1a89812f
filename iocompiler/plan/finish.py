"""From a grouped kernel to the kernels launched: split if it lacks parallelism, and scheduled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from iocompiler.cost_model.device import Device
from iocompiler.cost_model.row_schedule import row_programs
from iocompiler.cost_model.schedule import choose, split_factor
from iocompiler.plan.data import KernelStep, TensorSpec
from iocompiler.tile.program import TileProgram
from iocompiler.tile.rows import column_reductions, split_rows
from iocompiler.tile.split import split_reduction


def finish(
    step: KernelStep, device: Device, hints: Mapping[str, int], place: str
) -> list[KernelStep]:
    """The scheduled kernels for the work of ``step``; workspaces between them are on ``place``."""
    program = step.program
    if column_reductions(program):
        walked = split_rows(program, row_programs(program, device, hints))
        return _two(step, walked, device, hints, place)
    parts = split_factor(program, device, hints)
    if parts > 1:
        halves = split_reduction(program, parts)
        if halves is not None:
            return _two(step, halves, device, hints, place)
    return [replace(step, schedule=choose(program, device, hints))]


def _two(
    step: KernelStep,
    halves: tuple[TileProgram, TileProgram],
    device: Device,
    hints: Mapping[str, int],
    place: str,
) -> list[KernelStep]:
    """Two steps passing workspaces named after the step's first result."""
    first, second = halves
    stem = (step.outputs[0][0] if step.outputs else step.args[0]) + "_"
    names = dict(zip([b.name for b in step.program.buffers], step.args, strict=True))
    workspaces: list[tuple[str, TensorSpec]] = []
    for buffer in first.buffers:
        if buffer.name not in names:
            names[buffer.name] = stem + buffer.name
            workspaces.append(
                (stem + buffer.name, TensorSpec((buffer.elements,), (1,), buffer.dtype, place))
            )
    made = dict(step.outputs)
    steps: list[KernelStep] = []
    for program, suffix, extra in ((first, "", workspaces), (second, "_fold", [])):
        schedule = choose(program, device, hints)
        outputs = [
            (names[b.name], made[names[b.name]])
            for b in program.buffers
            if names[b.name] in made and b.role == "out"
        ]
        steps.append(
            replace(
                step,
                name=step.name + suffix,
                program=program,
                schedule=schedule,
                args=tuple(names[b.name] for b in program.buffers),
                outputs=tuple(outputs + extra),
            )
        )
    return steps
