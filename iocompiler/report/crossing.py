"""What crosses between a whole program and device memory: the tensors its bound counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from iocompiler.cost_model.call import call_of_step
from iocompiler.cost_model.cost import greatest, least, nbytes, whole
from iocompiler.cost_model.families import elements_read
from iocompiler.cost_model.rules import price
from iocompiler.plan.contents import made
from iocompiler.plan.data import (
    AtenStep,
    BatchStep,
    KernelStep,
    MatmulStep,
    Plan,
    Ref,
    Step,
    TensorSpec,
)
from iocompiler.plan.moving import bases_of, storage
from iocompiler.tile.flat import LENGTH, PARTS
from iocompiler.tile.index import Size
from iocompiler.tile.traffic import Traffic, traffic


def crossing(plans: Sequence[Plan]) -> list[Size]:
    """The least bytes of each tensor the plans together read from memory or leave in it.

    What one plan hands to the next does not count. Of an input counts the most that any one step
    needs of it: a step that only picks rows of a table needs no more than it picks.
    """
    found: list[Size] = []
    for position, plan in enumerate(plans):
        earlier = {name for p in plans[:position] for name in _names(p)}
        later = {name for p in plans[position + 1 :] for name, _ in p.inputs}
        inputs = {name for name, spec in plan.inputs if spec is not None}
        owners, specs = _owners(plan)
        read, written = _most(plan, owners, specs)
        left = {r.name for r in plan.outputs if isinstance(r, Ref) and r.name not in later}
        left = {owners.get(name, name) for name in left} - inputs
        found += [size for name, size in read.items() if name in inputs - earlier]
        found += [size for name, size in written.items() if name in inputs]
        found += [nbytes(specs[name]) for name in left if name in specs]
    return found


def _most(
    plan: Plan, owners: Mapping[str, str], specs: Mapping[str, TensorSpec]
) -> tuple[dict[str, Size], dict[str, Size]]:
    """By value, the most bytes any one step reads of it, and overwrites in it."""
    read: dict[str, Size] = {}
    written: dict[str, Size] = {}
    for step in plan.steps:
        for found, sizes in ((read, _read(step, specs)), (written, _overwritten(step, specs))):
            for name, size in sizes.items():
                owner = owners.get(name, name)
                found[owner] = greatest(found.get(owner, 0), size)
    return read, written


def _names(plan: Plan) -> set[str]:
    """What a later graph may take from this one."""
    return {name for name, _ in plan.inputs} | {r.name for r in plan.outputs if isinstance(r, Ref)}


def _owners(plan: Plan) -> tuple[dict[str, str], dict[str, TensorSpec]]:
    """The value whose memory each view looks at, and every value's spec."""
    bases = bases_of(plan.steps)
    specs = {name: spec for name, spec in plan.inputs if spec is not None}
    for step in plan.steps:
        specs |= made(step)
    return {name: storage(name, bases) for name in bases}, specs


def _read(step: Step, specs: Mapping[str, TensorSpec]) -> dict[str, Size]:
    if isinstance(step, AtenStep):
        call = call_of_step(step, specs)
        if call.name == "aten.copy_":
            return {o.name: nbytes(o.spec) for o in call.operands if o not in call.mutated}
        return {o.name: count * o.spec.dtype.itemsize for o, count in elements_read(call)}
    found: dict[str, Size] = {}
    for name, moved in _buffers(step):
        found[name] = greatest(found.get(name, 0), moved.read_bytes)
    return found


def _overwritten(step: Step, specs: Mapping[str, TensorSpec]) -> dict[str, Size]:
    """Bytes written into values that stood before the step."""
    if isinstance(step, AtenStep):
        call = call_of_step(step, specs)
        total = price(call).written_bytes
        return {o.name: least(nbytes(o.spec), total) for o in call.mutated}
    fresh = made(step)
    return {name: moved.written_bytes for name, moved in _buffers(step) if name not in fresh}


def _buffers(step: Step) -> Iterator[tuple[str, Traffic]]:
    """The value behind each buffer of a generated kernel, and what the kernel moves of it."""
    if isinstance(step, KernelStep):
        for name, buffer in zip(step.args, step.program.buffers, strict=True):
            yield name, traffic(replace(step.program, buffers=(buffer,)))
    elif isinstance(step, MatmulStep):
        for part in step.parts:
            read, size = part.product.elements_read, part.product.dtype.itemsize
            count = len(read)
            for name, elements in zip(part.args, read, strict=False):
                yield name, Traffic(elements * size, 0, 0, 0)
            for name, buffer in zip(part.args[count:], part.tensors, strict=True):
                yield name, traffic(replace(part.program, buffers=(buffer,)))
    elif isinstance(step, BatchStep):
        for (args, _), extents in zip(step.members, step.extents(), strict=True):
            for name, buffer in zip(args, step.program.buffers, strict=True):
                moved = traffic(replace(step.program, buffers=(buffer,)))
                yield name, at_extents(moved, extents)


def at_extents(moved: Traffic, extents: Mapping[str, Size]) -> Traffic:
    """The traffic of a batch's program for a member of these extents."""
    values = {symbol: extents[symbol.name] for symbol in (LENGTH, PARTS) if symbol.name in extents}
    read, written, flops, special = (
        size if isinstance(size, int) or not values else whole(size.subs(values))
        for size in (moved.read_bytes, moved.written_bytes, moved.flops, moved.transcendentals)
    )
    return Traffic(read, written, flops, special)
