"""The text of generated kernels, and what they and the templates take on the device: registers,
spills, shared memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from iocompiler.cost_model.device import Device
from iocompiler.errors import cause_of
from iocompiler.plan.data import AtenStep, BatchStep, KernelStep, MatmulStep, Plan
from iocompiler.report.build import Part
from iocompiler.report.ledger import Lost, Resources, Template
from iocompiler.report.templates import Templates


class Kernels:
    """Describes the generated kernels of the plans of one Dynamo graph, and the templates that
    their calls launch.

    What cannot be emitted or compiled would run on aten: it stands in ``lost``, and the kernels
    concerned have no text or no resources.

    Args:
        compile_kernels: compile them for ``device``, which need not be present. A CPU row, and a
        plan that is not for CUDA, have nothing to compile.
    """

    def __init__(self, parts: Iterable[Part], device: Device, compile_kernels: bool) -> None:
        self.lost: list[Lost] = []
        self._texts: dict[Hashable, str] = {}
        self._taken: dict[Hashable, Resources] = {}
        self._templates: list[Templates] = []
        if compile_kernels and device.capability is not None:
            for part in parts:
                if part.plan.device.startswith("cuda"):
                    self._compile(part, device)
        self.lost += [lost for each in self._templates for lost in each.lost()]

    def _compile(self, part: Part, device: Device) -> None:
        try:
            self._templates.append(Templates(part, device))
            self._taken |= compiled_resources(part.plan, device)
        except Exception as error:  # whatever the backend would fall back for
            self.lost.append(Lost(part.name, cause_of(error), getattr(error, "where", "")))

    def templates(self, step: AtenStep) -> tuple[Template, ...]:
        """Those that a step launches, where they are compiled."""
        return next(filter(None, (each.of(step) for each in self._templates)), ())

    def describe(self, step: KernelStep | MatmulStep | BatchStep) -> tuple[str, Resources | None]:
        """The Triton text of a step's kernel, and what it takes if it was compiled."""
        key = step.kernel
        if key not in self._texts:
            self._texts[key] = self._emit(step)
        return self._texts[key], self._taken.get(key)

    def _emit(self, step: KernelStep | MatmulStep | BatchStep) -> str:
        from iocompiler.codegen.module import emit_step

        try:
            return emit_step(step, step.name)
        except Exception as error:
            self.lost.append(Lost(step.name, cause_of(error), step.where[0] if step.where else ""))
            return ""


def compiled_resources(plan: Plan, device: Device) -> dict[Hashable, Resources]:
    """What each distinct kernel of a plan takes, compiled for ``device``.

    Raises:
        CompileError: a kernel does not compile.
    """
    from iocompiler.runtime.load import prepare

    steps = [s for s in plan.steps if isinstance(s, (KernelStep, MatmulStep, BatchStep))]
    if not steps:
        return {}
    module = prepare(plan, device)
    # a module has one kernel for steps that are equal but for their tensors, in the plan's order
    keys = list(dict.fromkeys(step.kernel for step in steps))
    names = list(dict.fromkeys(spec.name for spec in module.kernels.values()))
    found = module.resources
    return {
        key: Resources(**found[name])
        for key, name in zip(keys, names, strict=True)
        if name in found
    }
