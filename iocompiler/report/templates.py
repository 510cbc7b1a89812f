"""The templates that the calls of a plan launch, and what they take on a device that need not be
here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from iocompiler.cost_model.device import Device
from iocompiler.errors import cause_of
from iocompiler.ops.target import planned_for
from iocompiler.plan.data import AtenStep
from iocompiler.report.build import Part
from iocompiler.report.ledger import Lost, Resources, Template

if TYPE_CHECKING:
    from iocompiler.runtime.template_form import Form

_HERE = torch.device("cpu")


class Templates:
    """Those of one plan. They are being compiled; who asks for what comes of it waits.

    Args:
        device: one with a capability.
    """

    def __init__(self, part: Part, device: Device) -> None:
        # these import Triton
        from iocompiler.runtime.ahead import by_call
        from iocompiler.runtime.template_images import prepare

        assert device.capability is not None
        major, minor = device.capability
        with planned_for(device.capability):
            self._calls = by_call(part.plan, _HERE, part.hints, 10 * major + minor)
        self._images = prepare(dict.fromkeys(f for _, forms in self._calls for f in forms))

    def of(self, step: AtenStep) -> tuple[Template, ...]:
        """What a step of the plan launches; what differs in nothing that is shown, once."""
        forms = next((forms for each, forms in self._calls if each is step), ())
        return tuple(dict.fromkeys(Template(f.kernel.name, self._resources(f)) for f in forms))

    def lost(self) -> Iterator[Lost]:
        """The calls that run on aten, since a template of theirs does not compile."""
        for step, forms in self._calls:
            for error in (self._images[form].exception() for form in forms):
                if error is not None:
                    yield Lost(step.target.removesuffix(".default"), cause_of(error), step.where)

    def _resources(self, form: Form) -> Resources | None:
        image = self._images[form]
        if image.exception() is not None:
            return None
        found = image.result().metadata
        return Resources(*(int(found[name]) for name in ("registers", "spills", "shared")))
