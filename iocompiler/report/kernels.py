"""The text of generated kernels and what they take on the device: registers, spills, shared
memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from iocompiler.cost_model.device import Device
from iocompiler.plan.data import BatchStep, KernelStep, Plan, Schedule
from iocompiler.report.build import Describe
from iocompiler.report.ledger import Resources
from iocompiler.tile.program import TileProgram

Key: TypeAlias = tuple[TileProgram, Schedule]


def describer(plans: Iterable[Plan], device: Device, compile_kernels: bool) -> Describe:
    """Describes the generated kernels of these plans.

    Args:
        compile_kernels: compile them for ``device``, which need not be present. A CPU row, and a
            plan that is not for CUDA, have nothing to compile.

    Raises:
        CompileError: a kernel does not compile.
    """
    from iocompiler.codegen.triton import emit

    taken: dict[Key, Resources] = {}
    for plan in plans:
        if compile_kernels and device.capability is not None and plan.device.startswith("cuda"):
            taken |= compiled_resources(plan, device)
    texts: dict[Key, str] = {}

    def describe(step: KernelStep | BatchStep) -> tuple[str, Resources | None]:
        key = (step.program, step.schedule)
        if key not in texts:
            texts[key] = emit(step.program, step.schedule, step.name)
        return texts[key], taken.get(key)

    return describe


def compiled_resources(plan: Plan, device: Device) -> dict[Key, Resources]:
    """What each distinct kernel of a plan takes, compiled for ``device``.

    Raises:
        CompileError: a kernel does not compile.
    """
    from iocompiler.runtime.load import prepare

    steps = [s for s in plan.steps if isinstance(s, (KernelStep, BatchStep))]
    if not steps:
        return {}
    module = prepare(plan, device)
    # a module has one kernel for equal programs with equal schedules, in the order of the plan
    keys = list(dict.fromkeys((s.program, s.schedule) for s in steps))
    names = list(dict.fromkeys(spec.name for spec in module.kernels.values()))
    found = module.resources
    return {
        key: Resources(**found[name])
        for key, name in zip(keys, names, strict=True)
        if name in found
    }
