"""From plans to the ledger: each step priced by the same rules the planner used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from iocompiler.cost_model.bound import lower_bound
from iocompiler.cost_model.call import call_of_step
from iocompiler.cost_model.cost import Cost, value_of
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.kernel import kernel_seconds
from iocompiler.cost_model.roofline import time
from iocompiler.cost_model.rules import price
from iocompiler.plan.data import (
    AtenStep,
    BatchStep,
    KernelStep,
    Plan,
    Ref,
    Schedule,
    Step,
    TensorSpec,
    ViewStep,
)
from iocompiler.report.ledger import Edge, Kernel, Report, Resources
from iocompiler.tile.flat import LENGTH
from iocompiler.tile.index import Size, product
from iocompiler.tile.program import TileProgram
from iocompiler.tile.traffic import traffic

Describe = Callable[[KernelStep | BatchStep], tuple[str, Resources | None]]
"""The Triton text of a generated kernel and what it takes when compiled."""


@dataclass(frozen=True)
class Part:
    """The plan of one flat graph: ``name`` is "forward", "backward" or "inference", ``hints`` its
    sizes' values."""

    name: str
    plan: Plan
    hints: Mapping[str, int] = field(default_factory=dict)


def build_report(parts: Iterable[Part], device: Device, describe: Describe | None = None) -> Report:
    """The ledger of the graphs one Dynamo graph became: its forward and backward, or its inference.

    Args:
        parts: forward before backward: what the backward takes from the forward is known by its
        names.
        describe: gives generated kernels their text and resources; without it they have none.
    """
    ledger, costs = Report(device.name), Cost()
    known: dict[str, int] = {}
    parts = tuple(parts)
    for part in parts:
        kernels, cost = _kernels(part, device, describe or _undescribed)
        edges = (
            Edge(e.producer, e.consumer, round(value_of(e.bytes, part.hints)), e.reason, part.name)
            for e in part.plan.unfused
        )
        ledger += Report(device.name, kernels=kernels, unfused=tuple(edges))
        costs += cost
        known |= part.hints
    inputs, outputs = _crossing(parts)
    least = lower_bound(inputs, outputs, (costs,), device)
    return replace(
        ledger,
        bytes_bound=round(value_of(least.bytes, known)),
        time_bound_us=least.time(device, known) * 1e6,
        sizes=tuple(known.items()),
    )


def _undescribed(step: KernelStep | BatchStep) -> tuple[str, Resources | None]:
    return "", None


def _kernels(part: Part, device: Device, describe: Describe) -> tuple[tuple[Kernel, ...], Cost]:
    """The launches of a plan in order, and their costs together."""
    specs = {name: spec for name, spec in part.plan.inputs if spec is not None}
    found: list[Kernel] = []
    total = Cost()
    for step in part.plan.steps:
        if isinstance(step, (KernelStep, BatchStep)):
            cost, kernel = _generated(step, part, device, describe)
        elif isinstance(step, AtenStep):
            cost, kernel = _called(step, part, device, specs)
        else:
            cost, kernel = Cost(), None
        specs |= _made(step)
        total += cost
        if kernel is not None:
            found.append(kernel)
    return tuple(found), total


def _made(step: Step) -> dict[str, TensorSpec]:
    if isinstance(step, (KernelStep, BatchStep)):
        return dict(step.outputs)
    if isinstance(step, AtenStep):
        return {name: spec for name, spec in step.outputs if name is not None and spec is not None}
    return {step.name: step.spec}


def _generated(
    step: KernelStep | BatchStep, part: Part, device: Device, describe: Describe
) -> tuple[Cost, Kernel]:
    cost, seconds, least = Cost(), 0.0, 0
    for length in _launch_lengths(step):
        hints = {
            **part.hints,
            **({} if length is None else {LENGTH.name: round(value_of(length, part.hints))}),
        }
        moved = traffic(step.program)
        numbers = (moved.read_bytes, moved.written_bytes, moved.flops, moved.transcendentals)
        once = (
            Cost(*(round(value_of(n, hints)) for n in numbers))
            if length is not None
            else Cost(*numbers)
        )
        cost += once
        # one launch for all members of a batch
        seconds += kernel_seconds(step.program, device, hints) - (
            device.launch_s if seconds else 0.0
        )
        least += min(round(value_of(once.bytes, hints)), buffers_once(step.program, hints))
    source, resources = describe(step)
    total = round(value_of(cost.bytes, part.hints))
    return cost, Kernel(
        name=step.name,
        graph=part.name,
        ops=step.nodes,
        where=step.where,
        bytes=total,
        bound=least,
        flops=round(value_of(cost.flops, part.hints)),
        time_us=seconds * 1e6,
        tile=show_schedule(step.schedule),
        layout=", ".join(show_spec(spec) for _, spec in step.outputs[:4]),
        source=source,
        resources=resources,
        formula=_formula(cost),
        generated=True,
    )


def _launch_lengths(step: KernelStep | BatchStep) -> list[Size | None]:
    return [None] if isinstance(step, KernelStep) else [length for _, length in step.members]


def buffers_once(program: TileProgram, hints: Mapping[str, int]) -> int:
    """Bytes of every buffer of a kernel read or written once, both for one updated in place."""
    total = 0.0
    for buffer in program.buffers:
        if buffer.role != "scalar":
            times = 2 if buffer.role == "inout" else 1
            total += times * value_of(buffer.elements, hints) * buffer.dtype.itemsize
    return round(total)


def _called(
    step: AtenStep, part: Part, device: Device, specs: Mapping[str, TensorSpec]
) -> tuple[Cost, Kernel | None]:
    call = call_of_step(step, specs)
    cost = price(call)
    if cost == Cost():
        return cost, None  # a view, or memory handed out
    results = [spec for _, spec in step.outputs if spec is not None]
    dtype = (results or [o.spec for o in call.operands])[0].dtype
    total = round(value_of(cost.bytes, part.hints))
    return cost, Kernel(
        name=step.target,
        graph=part.name,
        ops=(step.node,) if step.node else (),
        where=(step.where,) if step.where else (),
        bytes=total,
        bound=total,
        flops=round(value_of(cost.flops, part.hints)),
        time_us=time(cost, device, dtype, part.hints) * 1e6,
        tile=step.reason,
        layout=", ".join(show_spec(spec) for spec in results[:4]),
        source=f"torch.ops.{step.target}",
        formula=_formula(cost),
    )


def _formula(cost: Cost) -> str:
    return "" if isinstance(cost.bytes, (int, float)) else str(cost.bytes)


# --- what crosses between a whole program and memory


def _crossing(parts: tuple[Part, ...]) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The tensors read from and left in memory by all parts together, those one hands to the next
    left out."""
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    for position, part in enumerate(parts):
        earlier = {name for p in parts[:position] for name in _names(p.plan)}
        later = {name for p in parts[position + 1 :] for name, _ in p.plan.inputs}
        owners, specs = _owners(part.plan)
        read = {owners.get(name, name) for step in part.plan.steps for name in _read(step)}
        placeholders = {name for name, spec in part.plan.inputs if spec is not None}
        inputs += [specs[name] for name in placeholders & read - earlier]
        left = {
            owners.get(r.name, r.name)
            for r in part.plan.outputs
            if isinstance(r, Ref) and r.name not in later
        }
        written = {
            owners.get(name, name) for step in part.plan.steps for name in _overwritten(step)
        }
        outputs += [
            specs[name]
            for name in (left - placeholders) | (written & placeholders)
            if name in specs
        ]
    return inputs, outputs


def _names(plan: Plan) -> set[str]:
    """What a later graph may take from this one."""
    return {name for name, _ in plan.inputs} | {r.name for r in plan.outputs if isinstance(r, Ref)}


def _owners(plan: Plan) -> tuple[dict[str, str], dict[str, TensorSpec]]:
    """The value whose memory each view looks at, and every value's spec."""
    owners: dict[str, str] = {}
    specs = {name: spec for name, spec in plan.inputs if spec is not None}
    for step in plan.steps:
        specs |= _made(step)
        if isinstance(step, ViewStep):
            owners[step.name] = owners.get(step.base, step.base)
    return owners, specs


def _read(step: Step) -> set[str]:
    if isinstance(step, AtenStep):
        skipped = step.args[:1] if step.target.startswith("aten.copy_.") else ()
        return refs(step.args[len(skipped) :]) | refs(tuple(v for _, v in step.kwargs))
    return _buffers(step, ("in", "inout", "scalar"))


def _overwritten(step: Step) -> set[str]:
    """Values written into beside those a step makes."""
    if isinstance(step, AtenStep):
        return {o.name for o in call_of_step(step, _Anything()).mutated}
    return _buffers(step, ("out", "inout")) - set(_made(step))


def _buffers(step: Step, roles: tuple[str, ...]) -> set[str]:
    if isinstance(step, KernelStep):
        members: tuple[tuple[str, ...], ...] = (step.args,)
    elif isinstance(step, BatchStep):
        members = tuple(args for args, _ in step.members)
    else:
        return set()
    buffers = step.program.buffers
    return {
        name for args in members for name, b in zip(args, buffers, strict=True) if b.role in roles
    }


class _Anything(dict[str, TensorSpec]):
    """Knows every name: where only which tensors a call names matters, not their specs."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> TensorSpec:
        import torch

        return TensorSpec((), (), torch.float32, "cpu")


def refs(value: object) -> set[str]:
    """The names of all values in a step's arguments."""
    if isinstance(value, Ref):
        return {value.name}
    if isinstance(value, (tuple, list)):
        return {name for item in value for name in refs(item)}
    return set()


# --- words


def show_schedule(schedule: Schedule) -> str:
    """As "persistent 4 x 1024, 8 warps"."""
    blocks = {
        "pointwise": [schedule.y_block, schedule.x_block]
        if schedule.y_block > 1
        else [schedule.x_block],
        "persistent": [schedule.x_block, schedule.r_block],
        "looped": [schedule.x_block, schedule.r_block],
        "rows": [schedule.x_block, schedule.r_block],
    }[schedule.kind]
    words = f"{schedule.kind} {' x '.join(map(str, blocks))}, {schedule.num_warps} warps"
    return words + (f", {schedule.programs} programs" if schedule.programs else "")


_SHORT = {
    "float32": "f32",
    "float64": "f64",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
}


def show_spec(spec: TensorSpec) -> str:
    """As "bf16[8192, 768]"; strides follow where the tensor is not dense in row-major order."""
    name = str(spec.dtype).removeprefix("torch.")
    text = f"{_SHORT.get(name, name)}[{', '.join(map(str, spec.shape))}]"
    dense = tuple(product(spec.shape[i + 1 :]) for i in range(len(spec.shape)))
    regular = all(
        s == d or size == 1 for s, d, size in zip(spec.stride, dense, spec.shape, strict=True)
    )
    return text if regular else f"{text} by ({', '.join(map(str, spec.stride))})"


__all__ = ["Describe", "Part", "buffers_once", "build_report", "refs", "show_schedule", "show_spec"]
