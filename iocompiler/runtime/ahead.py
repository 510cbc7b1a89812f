"""Templates compiled ahead: those that the calls of a plan will launch; and the products that they
will ask a library for.

Which these are, the operators say themselves: their own Python runs on tensors that have no memory,
and its launches are noted. What cannot run so is compiled when it is first launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map_only

from iocompiler.ops import library
from iocompiler.ops.library_product import Problem
from iocompiler.ops.multiply import noted
from iocompiler.plan.contents import made, regions
from iocompiler.plan.data import AtenStep, Plan, TensorSpec, ViewStep
from iocompiler.runtime.template_form import Form
from iocompiler.runtime.template_images import prepare
from iocompiler.runtime.template_launch import Launch, watched
from iocompiler.runtime.values import resolve, size_value, size_values, storage_elements
from iocompiler.tile.index import Size

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A tensor of a plan, so many elements behind an allocation."""

    spec: TensorSpec
    offset: Size = 0


def compile_ahead(plan: Plan, device: torch.device, hints: Mapping[str, int]) -> None:
    """Have the templates of a plan compiled for a GPU, in the background.

    Args:
        hints: values of the plan's size symbols; calls that read others are left out.
    """
    if any(calls(plan, library.launches)):
        major, minor = torch.cuda.get_device_capability(device)
        prepare(launched(plan, device, hints, 10 * major + minor))


def launched(
    plan: Plan, device: torch.device, hints: Mapping[str, int], capability: int
) -> list[Form]:
    """The forms of what the plan's calls launch on ``device``, in order."""
    calls = by_call(plan, device, hints, capability)
    return list(dict.fromkeys(form for _, forms in calls for form in forms))


def by_call(
    plan: Plan, device: torch.device, hints: Mapping[str, int], capability: int
) -> list[tuple[AtenStep, tuple[Form, ...]]]:
    """The calls of operators that launch templates, those in regions too, and the forms of what
    each launches.

    Args:
        device: the CPU where the plan's GPU is not here: it is then the one planned for
            (`ops.target`).
    """

    def forms(run: Callable[[], None]) -> tuple[Form, ...]:
        found: dict[Form, None] = {}

        def note(launch: Launch, tensors: Mapping[str, Any]) -> None:
            found[launch.form(tensors, capability)] = None

        with watched(note):
            run()
        return tuple(found)

    return _each_call(plan, library.launches, device, hints, forms)


def multiplied(plan: Plan, device: torch.device, hints: Mapping[str, int]) -> list[Problem]:
    """The products inside of the operators that the plan calls, one a call of `multiply`: equal
    ones stand there as often as they are made.

    Args:
        hints: values of the plan's size symbols; calls that read others are left out.
    """

    def problems(run: Callable[[], None]) -> list[Problem]:
        found: list[Problem] = []
        with noted(found.append), watched(lambda launch, tensors: None):
            run()
        return found

    each = _each_call(plan, library.multiplies, device, hints, problems)
    return [problem for _, problems in each for problem in problems]


def _each_call(
    plan: Plan,
    wanted: Callable[[str], bool],
    device: torch.device,
    hints: Mapping[str, int],
    look: Callable[[Callable[[], None]], T],
) -> list[tuple[AtenStep, T]]:
    """The calls of ``wanted`` operators, and what ``look`` finds of each, given a function that
    runs the operator's Python without memory, until it fails.
    """
    # of what an operator keeps for later calls (tables of blocks) the tensors are real
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(place: Place) -> Tensor:
        with mode:
            return memory(place, device, hints)

    def run(name: str, given: Any) -> None:
        args, kwargs = tree_map_only(Place, fake, given)
        with contextlib.suppress(Exception):
            library.function(name)(*args, **kwargs)

    known: dict[str, T] = {}  # equal layers have equal calls
    found: list[tuple[AtenStep, T]] = []
    with unset_fake_temporarily(), torch.no_grad():
        for name, step, places in calls(plan, wanted):
            with contextlib.suppress(KeyError):
                given = resolve((step.args, dict(step.kwargs)), places, hints, device)
                call = repr((name, given))
                if call not in known:
                    known[call] = look(partial(run, name, given))
                found.append((step, known[call]))
    return found


def calls(
    plan: Plan, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, AtenStep, dict[str, Place]]]:
    """The calls of our own operators whose names are ``wanted``, those in regions too: name, step,
    and where the tensors are that it may read.
    """
    places = _places(plan)
    for step in plan.steps:
        if not isinstance(step, AtenStep):
            continue
        for region in regions((step.args, dict(step.kwargs))):
            yield from calls(region.plan, wanted)
        namespace, name, *_ = step.target.split(".")
        if namespace == "iocompiler" and wanted(name):
            yield name, step, places


def _places(plan: Plan) -> dict[str, Place]:
    places = {name: Place(spec) for name, spec in plan.inputs if spec is not None}
    for step in plan.steps:
        if isinstance(step, ViewStep) and step.base in places:
            places[step.name] = Place(step.spec, places[step.base].offset + step.offset)
        else:
            places |= {name: Place(spec) for name, spec in made(step).items()}
    return places


def memory(place: Place, device: torch.device, hints: Mapping[str, int]) -> Tensor:
    """An uninitialised tensor that lies as the one of the plan; CUDA devices are ``device``."""
    spec, offset = place.spec, size_value(place.offset, hints)
    shape, stride = size_values(spec.shape, hints), size_values(spec.stride, hints)
    where = device if torch.device(spec.device).type == "cuda" else torch.device(spec.device)
    storage = torch.empty(offset + storage_elements(shape, stride), dtype=spec.dtype, device=where)
    return storage.as_strided(shape, stride, offset)
