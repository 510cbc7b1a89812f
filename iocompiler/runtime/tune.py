"""Schedules by the clock: a plan's kernels compiled in several ways, timed, the fastest kept.

Only under mode="max-autotune". What was found is kept in the cache under the program's text, so a
second compilation, in this process or another, measures nothing.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from iocompiler.codegen.module import kernel_names
from iocompiler.cost_model.candidates import candidates
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.kernel import kernel_seconds
from iocompiler.plan.data import BatchStep, KernelStep, Plan, Schedule, Step
from iocompiler.runtime.cache import Cache, key_of
from iocompiler.runtime.compile import worker_count
from iocompiler.runtime.launch import Image
from iocompiler.runtime.measure import Bench, DoesNotFit
from iocompiler.runtime.stimulus import has_safe_arguments
from iocompiler.runtime.subject import Subject
from iocompiler.runtime.values import size_value
from iocompiler.tile.flat import LENGTH
from iocompiler.tile.index import Size
from iocompiler.tile.program import TileProgram

# a kernel modeled faster than this is mostly launch
SHORTEST_S = 5e-6
# the model's choice stays where the best is not faster by more
TIE = 1.02
# measuring may take this many times as long as compiling the model's choices took
_PATIENCE = 2.0
# and this long at least: they may have come from the cache
_LEAST_S = 2.0
# the part of that time in which candidates are compiled; the rest is for the clock
_COMPILING = 0.7
# of a size symbol nobody has an example of
_DEFAULT_SIZE = 1024

_Key = tuple[TileProgram, Schedule]
_Built = dict[Schedule, Image]


@dataclass(frozen=True)
class Tuned:
    """What was measured of one kernel.

    Attributes:
        kernel: its name in the generated module.
        chosen, model: the schedule kept, and the one the model had chosen.
        seconds: of a launch, by schedule.
    """

    kernel: str
    chosen: Schedule
    model: Schedule
    seconds: Mapping[Schedule, float]

    @property
    def gain(self) -> float:
        """How many times faster the chosen schedule is than the model's; 1.0 where they are one."""
        if self.chosen == self.model:
            return 1.0
        before = self.seconds.get(self.model)
        return before / self.seconds[self.chosen] if before is not None else float("inf")


def tune(
    plan: Plan,
    device: Device,
    hints: Mapping[str, int],
    bench: Bench,
    cache: Cache | None,
    machine: str = "",
    most: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Plan, tuple[Tuned, ...]]:
    """The plan with the fastest schedules found, and what was measured.

    A schedule that does not compile, spills registers, or cannot be launched is not kept. Compiling
    and timing together take at most about three times what compiling the model's choices takes;
    kernels are taken in the order of the time the model gives them, and what is not reached keeps
    the model's choice.

    Args:
        hints: an example value for every size symbol.
        machine: the name of the GPU, for the cache.
        most: seconds that this may take, whatever compiling takes.
    """
    subjects = subjects_of(plan, device, hints, SHORTEST_S)
    keys = {s.name: _cache_key(s, device, machine) for s in subjects}
    known: dict[str, Tuned | None] = {s.name: _remembered(cache, keys[s.name], s) for s in subjects}
    missing = [s for s in subjects if known[s.name] is None]
    for measured in _measured(missing, device, bench, most, clock):
        known[measured.kernel] = measured
        _remember(cache, keys[measured.kernel], measured)
    chosen = {
        (s.program, s.chosen): found.chosen
        for s in subjects
        if (found := known[s.name]) is not None
    }
    return rescheduled(plan, chosen), tuple(t for t in known.values() if t is not None)


def rescheduled(plan: Plan, chosen: Mapping[_Key, Schedule]) -> Plan:
    """The plan with other schedules for the kernels that have a choice, by program and schedule."""

    def changed(step: Step) -> Step:
        if not isinstance(step, (KernelStep, BatchStep)):
            return step
        schedule = chosen.get((step.program, step.schedule), step.schedule)
        return dataclasses.replace(step, schedule=schedule)

    return dataclasses.replace(plan, steps=tuple(changed(step) for step in plan.steps))


# --- what is measured


def subjects_of(
    plan: Plan, device: Device, hints: Mapping[str, int], shortest: float = SHORTEST_S
) -> list[Subject]:
    """The distinct kernels modeled to take ``shortest`` seconds or more, the one with most time in
    the plan first.
    """
    steps = [step for step in plan.steps if _has_choice(step)]
    first: dict[_Key, KernelStep | BatchStep] = {}
    weight: dict[_Key, float] = {}
    for step in steps:
        key = (step.program, step.schedule)
        sizes = _sizes(step, hints)
        seconds = kernel_seconds(step.program, device, sizes)
        if seconds >= shortest and has_safe_arguments(step.program, sizes):
            first.setdefault(key, step)
            weight[key] = weight.get(key, 0.0) + seconds
    if not first:
        return []
    names = kernel_names(plan)
    ordered = sorted(first, key=lambda key: -weight[key])
    return [Subject(first[key], *names[key], _sizes(first[key], hints)) for key in ordered]


def _has_choice(step: Step) -> TypeGuard[KernelStep | BatchStep]:
    """Whether the step's schedule may be another: folds that are launched together take what their
    launches took, and little of it.
    """
    return isinstance(step, KernelStep) or (isinstance(step, BatchStep) and not step.parts)


def _sizes(step: KernelStep | BatchStep, hints: Mapping[str, int]) -> dict[str, int]:
    """A value for every symbol of the step; of a batch, also the points of all members."""
    read: list[Size] = [b.elements for b in step.program.buffers]
    if isinstance(step, BatchStep):
        read += [length for _, length in step.members]
    symbols = {s.name for size in read if not isinstance(size, int) for s in size.free_symbols}
    names = sorted(symbols | set(step.program.size_symbols))
    sizes = {name: int(hints.get(name, _DEFAULT_SIZE)) for name in names}
    if isinstance(step, BatchStep):
        sizes[LENGTH.name] = sum(size_value(length, sizes) for _, length in step.members)
    return sizes


# --- measuring


def _measured(
    subjects: list[Subject],
    device: Device,
    bench: Bench,
    most: float,
    clock: Callable[[], float],
) -> Iterator[Tuned]:
    if most <= 0:
        return
    start = clock()
    found = {s.name: candidates(s.program, device, s.sizes, first=s.chosen) for s in subjects}
    built: dict[str, _Built] = {s.name: {} for s in subjects}
    _compile([(s, s.chosen) for s in subjects], bench, built)
    allowed = min(most, max(_LEAST_S, _PATIENCE * (clock() - start)))
    others = [
        (s, found[s.name][rank])
        for rank in range(max(map(len, found.values()), default=0))
        for s in subjects
        if rank < len(found[s.name]) and found[s.name][rank] != s.chosen
    ]
    at_once = worker_count()
    for place in range(0, len(others), at_once):
        if clock() - start > _COMPILING * allowed:
            break
        _compile(others[place : place + at_once], bench, built)
    for subject in subjects:
        if clock() - start > allowed:
            return
        tuned = _fastest(subject, built[subject.name], bench)
        if tuned is not None:
            yield tuned


def _compile(
    wanted: list[tuple[Subject, Schedule]], bench: Bench, built: dict[str, _Built]
) -> None:
    for (subject, schedule), image in zip(wanted, bench.compile(wanted), strict=True):
        if image is not None:
            built[subject.name][schedule] = image


def _fastest(subject: Subject, built: _Built, bench: Bench) -> Tuned | None:
    """The measurement of a subject; None where there is nothing to choose from."""
    model = subject.chosen
    clean = [(s, i) for s, i in built.items() if i.metadata["spills"] <= 0 or s == model]
    if len(clean) < 2:
        return None
    try:
        times = bench.time(subject, clean)
    except DoesNotFit:
        return None
    seconds = {s: t for (s, _), t in zip(clean, times, strict=True) if t is not None}
    if not seconds:
        return None
    best = min(seconds, key=lambda s: seconds[s])
    tied = model in seconds and seconds[model] <= TIE * seconds[best]
    return Tuned(subject.name, model if tied else best, model, seconds)


# --- remembering


def _cache_key(subject: Subject, device: Device, machine: str) -> str:
    step, sizes = subject.step, dict(subject.sizes)
    lengths = subject.lengths if isinstance(step, BatchStep) else []
    model = dataclasses.asdict(subject.chosen)
    text = str(subject.program)
    return key_of("tuning", text, subject.signature, model, sizes, lengths, repr(device), machine)


def _remembered(cache: Cache | None, key: str, subject: Subject) -> Tuned | None:
    entry = cache.get("tuning", key) if cache is not None else None
    if entry is None:
        return None
    seconds = {Schedule(**row["schedule"]): float(row["seconds"]) for row in entry.meta["measured"]}
    return Tuned(subject.name, Schedule(**entry.meta["chosen"]), subject.chosen, seconds)


def _remember(cache: Cache | None, key: str, found: Tuned) -> None:
    if cache is None:
        return
    measured = [{"schedule": _row(s), "seconds": t} for s, t in found.seconds.items()]
    cache.store("tuning", key, {}, {"chosen": _row(found.chosen), "measured": measured})


def _row(schedule: Schedule) -> dict[str, Any]:
    return dataclasses.asdict(schedule)
