"""Memory that a plan need not allocate.

Partial sums of one kernel, which its finishing kernel reads and nobody else, are one allocation:

    partial0, partial1 = empty(264 * 768), empty(264 * 768)  -->  partial0 = empty(2 * 264 * 768)

and a result takes the memory of one that is dead, where that is as large:

    mm = empty(2048, 768); ...; del mm; mm_1 = empty(2048, 768)  -->  mm_1 = mm

Who still reads a dead tensor does so on the stream that the next writer waits on. What dies is held
until it is taken, so nothing is taken where that would raise the peak.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch

from iocompiler.plan.contents import made, references
from iocompiler.plan.data import (
    AtenStep,
    BatchStep,
    KernelStep,
    MatmulStep,
    Plan,
    Step,
    TensorSpec,
    ViewStep,
)
from iocompiler.plan.moving import bases_of, names_read, storages, written
from iocompiler.plan.peak import held_bytes, storage_bytes
from iocompiler.plan.place import Place
from iocompiler.plan.sizes import equal, is_multiple, normal, value_at
from iocompiler.tile.index import Size, product
from iocompiler.tile.traffic import VECTOR_BYTES

WITH_OUT = {
    f"aten.{name}.default": f"torch.{name}"
    for name in ("mm", "bmm", "addmm", "_addmm_activation", "baddbmm")
}
"""Calls that write into memory of ours, and what the generated module calls for them: functions
that parse arguments faster than the operator, and keep the strides that were planned.
"""
_ALIGNED = 256
"""Bytes that what shares an allocation is apart: as good as one of its own for any access."""
_FORGETTING = ("iocompiler.attention", "iocompiler.scored_attention", "iocompiler.linear_",
               "iocompiler.embedding_gradient", "aten._scaled_dot_product_")  # fmt: skip
"""Calls, by how their names begin, that neither keep what they read nor return it."""
_FORGETTING_TOO = WITH_OUT.keys() | {
    "aten.copy_.default", "aten.convolution.default", "iocompiler.aligned_mm.default",
    "iocompiler.sum_of_products.default", "iocompiler.addmm_gelu.default",
    "iocompiler.biased_addmm.default", "iocompiler.wide_product.default",
}  # fmt: skip
_CALLERS = "primals"
"""AOTAutograd's name for inputs that stay the caller's while the plan runs."""


def shared_memory(plan: Plan, hints: Mapping[str, int], donated: Collection[str] = ()) -> Plan:
    """The plan with such results in the memory of others (`Plan.placed`).

    Args:
        plan: with its results in place (`inplace.py`).
        hints: an example value for every size symbol.
        donated: inputs that nobody reads after the last call for them, each in memory of its own.
    """
    uses = Uses(plan)
    beside = dict(_beside(uses))
    taken = _Taking(uses, beside, _Held(plan, hints, donated)).run()
    return replace(plan, placed=tuple({**beside, **taken}.items()))


def takes_out(step: Step, device: str) -> bool:
    """Whether a call writes into memory of ours, which lies on the plan's own ``device``."""
    if not isinstance(step, AtenStep):
        return False
    if step.target not in WITH_OUT and step.product is None:
        return False
    if step.is_tuple or len(step.outputs) != 1:
        return False
    spec = step.outputs[0][1]
    return spec is not None and spec.device == device


def rooms(steps: Iterable[Step], placed: Mapping[str, Place]) -> dict[str, Size]:
    """Of each result with others behind it, the elements that it is allocated with."""
    specs = {name: spec for step in steps for name, spec in made(step).items()}
    behind = [(name, place) for name, place in placed.items() if place.offset != 0]
    # the last one reaches furthest
    return {place.root: place.offset + specs[name].reach for name, place in behind}


class Uses:
    """Who makes and touches which storage of a plan.

    Attributes:
        bases: of each value that shows another's storage, that one.
        seen: storages that calls or the caller see as tensors; kernels, and a library's products,
            see addresses.
        last: the last step that touches each storage.
    """

    def __init__(self, plan: Plan) -> None:
        self.steps = plan.steps
        self.device = plan.device
        self.bases = bases_of(plan.steps)
        self.seen = self._roots(ref.name for ref in references(plan.outputs))
        self.last: dict[str, int] = {}
        own: set[str] = set()
        kept = set(self.seen)  # by the caller, or a call that may go on reading it
        for at, step in enumerate(plan.steps):
            own |= set(allocated(step, plan.device))
            if not isinstance(step, ViewStep):
                for root in self._roots(names_read(step) | written(step) | set(made(step))):
                    self.last[root] = at
            self.seen |= self._roots(_numbers(step))
            if isinstance(step, AtenStep):
                touched = self._roots({*names_read(step), *made(step)})
                self.seen |= touched if step.product is None else set()
                kept |= set() if _forgets(step.target) else touched
        self._free = own - kept

    def _roots(self, names: Iterable[str]) -> set[str]:
        return storages(set(names), self.bases)

    def is_free(self, name: str) -> bool:
        """Whether others may have the memory of a result once that is dead."""
        return name in self._free


def _numbers(step: Step) -> set[str]:
    """The tensors that a kernel is given as numbers."""
    if isinstance(step, (KernelStep, MatmulStep)):
        members: Iterable[tuple[str, ...]] = [step.args]
        buffers = step.buffers
    elif isinstance(step, BatchStep):
        members, buffers = [args for args, _ in step.members], step.program.buffers
    else:
        return set()
    scalars = [at for at, buffer in enumerate(buffers) if buffer.role == "scalar"]
    return {args[at] for args in members for at in scalars}


def allocated(step: Step, device: str) -> dict[str, TensorSpec]:
    """The results of a step that the generated module allocates."""
    if isinstance(step, KernelStep):
        over = dict(step.over)
        return {name: spec for name, spec in step.outputs if name not in over}
    if isinstance(step, (MatmulStep, BatchStep)) or takes_out(step, device):
        return made(step)
    if isinstance(step, AtenStep) and step.product is not None:
        return made(step)
    return {}


def _forgets(target: str) -> bool:
    return target in _FORGETTING_TOO or target.startswith(_FORGETTING)


def _beside(uses: Uses) -> Iterable[tuple[str, Place]]:
    """Results that only kernels see and that die together lie behind the first of them."""
    for step in uses.steps:
        groups: dict[tuple[torch.dtype, int], list[tuple[str, TensorSpec]]] = {}
        if not isinstance(step, AtenStep):
            for name, spec in allocated(step, uses.device).items():
                if uses.is_free(name) and name not in uses.seen and _is_filled(spec):
                    groups.setdefault((spec.dtype, uses.last[name]), []).append((name, spec))
        for (dtype, _), members in groups.items():
            yield from _behind(members, dtype.itemsize)


def _behind(members: list[tuple[str, TensorSpec]], itemsize: int) -> Iterable[tuple[str, Place]]:
    (root, spec), *others = members
    end = _padded(spec.reach, itemsize)
    for name, other in others:
        if end is None:
            root, end = name, _padded(other.reach, itemsize)
            continue
        yield name, Place(root, end)
        size = _padded(other.reach, itemsize)
        end = None if size is None else end + size


def _padded(elements: Size, itemsize: int) -> Size | None:
    """Elements to what comes next; None where that would not be aligned."""
    if isinstance(elements, int):
        step = _ALIGNED // itemsize
        return -(-elements // step) * step
    return elements if is_multiple(elements * itemsize, VECTOR_BYTES) else None


@lru_cache(maxsize=4096)
def _is_filled(spec: TensorSpec) -> bool:
    """Whether a tensor has a place for each element, one behind the other in some order."""
    count = product(spec.shape)
    return count != 0 and equal(count, spec.reach)


@dataclass(frozen=True)
class _Free:
    """Memory nobody reads any more: ``name`` had it last, a variable that shows it as ``spec``."""

    name: str
    spec: TensorSpec
    bytes: Size
    since: int


class _Taking:
    """Results put into memory that is free when they are made."""

    def __init__(self, uses: Uses, beside: Mapping[str, Place], held: _Held) -> None:
        self._uses, self._beside, self._held = uses, beside, held
        self._rooms = rooms(uses.steps, beside)
        self._free: dict[Size, list[_Free]] = {}  # by their bytes
        self._dying: dict[int, list[_Free]] = {}

    def run(self) -> dict[str, Place]:
        found: dict[str, Place] = {}
        for at, step in enumerate(self._uses.steps):
            for name, spec in allocated(step, self._uses.device).items():
                if name not in self._beside and _is_filled(spec):
                    given = self._result(at, name, spec)
                    if given is not None:
                        found[name] = Place(given.name)
            for each in self._dying.pop(at, []):
                self._free.setdefault(each.bytes, []).append(each)
        return found

    def _result(self, at: int, name: str, spec: TensorSpec) -> _Free | None:
        """What a result takes; the result is noted for when it dies itself."""
        size = normal(self._rooms.get(name, spec.reach) * spec.dtype.itemsize)
        given = self._given(at, name, spec, size)
        if given is not None:
            self._free[size].remove(given)
            self._held.hold(given, at)
        if self._uses.is_free(name):
            shown = spec if given is None or name in self._uses.seen else given.spec
            last = self._uses.last[name]
            self._dying.setdefault(last, []).append(_Free(name, shown, size, last))
        return given

    def _given(self, at: int, name: str, spec: TensorSpec, size: Size) -> _Free | None:
        """Rather one that is seen as the result will be, rather a recent one."""
        free = [f for f in reversed(self._free.get(size, ())) if self._held.allows(f, at)]
        if name in self._uses.seen:
            free = [f for f in free if f.spec.dtype == spec.dtype]
        return next((f for f in free if _is_same(f.spec, spec)), next(iter(free), None))


def _is_same(a: TensorSpec, b: TensorSpec) -> bool:
    return (a.shape, a.stride) == (b.shape, b.stride)


class _Held:
    """Bytes in use at each step, with what is held until it is taken."""

    def __init__(self, plan: Plan, hints: Mapping[str, int], donated: Collection[str]) -> None:
        self._hints = hints
        inputs = {name: spec for name, spec in plan.inputs if spec is not None}
        given = {n: storage_bytes(spec, hints) for n, spec in inputs.items() if n in donated}
        self._in_use = held_bytes(plan, given, hints)
        self._allowed = list(accumulate(self._in_use, max))
        # other inputs may die, too: with them the peak may lie before what is the highest here
        if all(name in given or name.startswith(_CALLERS) for name in inputs):
            self._allowed = self._allowed[-1:] * len(self._allowed)

    def allows(self, free: _Free, at: int) -> bool:
        size = value_at(free.bytes, self._hints)
        between = range(free.since + 1, at)
        return all(self._in_use[step] + size <= self._allowed[step] for step in between)

    def hold(self, free: _Free, at: int) -> None:
        size = value_at(free.bytes, self._hints)
        for step in range(free.since + 1, at):
            self._in_use[step] += size
