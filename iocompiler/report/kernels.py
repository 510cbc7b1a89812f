"""The text of generated kernels and what they take on the device: registers, spills, shared
memory."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from iocompiler.cost_model.device import Device
from iocompiler.plan.data import BatchStep, KernelStep, MatmulStep, Plan
from iocompiler.report.ledger import Lost, Resources


class Kernels:
    """Describes the generated kernels of the plans of one Dynamo graph, by the name of the flat
    graph.

    What cannot be emitted or compiled would run on aten: it stands in ``lost``, and the kernels
    concerned have no text or no resources.

    Args:
        compile_kernels: compile them for ``device``, which need not be present. A CPU row, and a
        plan that is not for CUDA, have nothing to compile.
    """

    def __init__(self, plans: Mapping[str, Plan], device: Device, compile_kernels: bool) -> None:
        self.lost: list[Lost] = []
        self._texts: dict[Hashable, str] = {}
        self._taken: dict[Hashable, Resources] = {}
        for name, plan in plans.items():
            if compile_kernels and device.capability is not None and plan.device.startswith("cuda"):
                self._compile(name, plan, device)

    def _compile(self, name: str, plan: Plan, device: Device) -> None:
        try:
            self._taken |= compiled_resources(plan, device)
        except Exception as error:  # whatever the backend would fall back for
            self.lost.append(Lost(name, _cause(error), getattr(error, "where", "")))

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
            self.lost.append(Lost(step.name, _cause(error), step.where[0] if step.where else ""))
            return ""


def _cause(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


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
