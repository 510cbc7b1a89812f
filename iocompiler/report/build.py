"""From plans to the ledger: each step priced by the same rules the planner used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from iocompiler.cost_model.bound import lower_bound
from iocompiler.cost_model.call import call_of_step
from iocompiler.cost_model.cost import Cost, value_of
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.kernel import kernel_seconds
from iocompiler.cost_model.matmul import matmul_cost
from iocompiler.cost_model.matmul_price import matmul_seconds
from iocompiler.cost_model.roofline import relaid_bytes, time
from iocompiler.cost_model.rules import price
from iocompiler.plan.contents import made
from iocompiler.plan.data import AtenStep, BatchStep, KernelStep, MatmulStep, Plan, TensorSpec
from iocompiler.report.crossing import at_extents, crossing
from iocompiler.report.ledger import Edge, Kernel, Report, Resources, Template
from iocompiler.report.words import show_schedule, show_spec, show_tile
from iocompiler.runtime.values import in_numbers
from iocompiler.tf32 import products_rounded, rounded
from iocompiler.tile.index import Size
from iocompiler.tile.program import Buffer, TileProgram
from iocompiler.tile.traffic import traffic

Describe = Callable[[KernelStep | MatmulStep | BatchStep], tuple[str, Resources | None]]
"""The Triton text of a generated kernel and what it takes when compiled."""
Launched = Callable[[AtenStep], tuple[Template, ...]]
"""The templates a call launches."""


@dataclass(frozen=True)
class Part:
    """The plan of one flat graph: ``name`` is "forward", "backward" or "inference", ``hints`` its
    sizes' values."""

    name: str
    plan: Plan
    hints: Mapping[str, int] = field(default_factory=dict)


def build_report(
    parts: Iterable[Part],
    device: Device,
    describe: Describe | None = None,
    launched: Launched | None = None,
) -> Report:
    """The ledger of the graphs one Dynamo graph became: its forward and backward, or its inference.

    Args:
        parts: forward before backward: what the backward takes from the forward is known by its
        names.
        describe: gives generated kernels their text and resources; without it they have none.
        launched: gives calls their templates.
    """
    ledger, costs = Report(device.name), Cost()
    known: dict[str, int] = {}
    parts = tuple(parts)
    for part in parts:
        kernels, cost = _kernels(part, device, describe or _undescribed, launched or _unknown)
        edges = (
            Edge(e.producer, e.consumer, round(value_of(e.bytes, part.hints)), e.reason, part.name)
            for e in part.plan.unfused
        )
        ledger += Report(device.name, kernels=kernels, unfused=tuple(edges))
        costs += cost
        known |= part.hints
    least = lower_bound(crossing([part.plan for part in parts]), (costs,), device)
    return replace(
        ledger,
        bytes_bound=round(value_of(least.bytes, known)),
        time_bound_us=least.time(device, known, products_rounded()) * 1e6,
        sizes=tuple(known.items()),
    )


def _undescribed(step: KernelStep | MatmulStep | BatchStep) -> tuple[str, Resources | None]:
    return "", None


def _unknown(step: AtenStep) -> tuple[Template, ...]:
    return ()


def _kernels(
    part: Part, device: Device, describe: Describe, launched: Launched
) -> tuple[tuple[Kernel, ...], Cost]:
    """The launches of a plan in order, and their costs together."""
    specs = {name: spec for name, spec in part.plan.inputs if spec is not None}
    found: list[Kernel] = []
    total = Cost()
    for step in part.plan.steps:
        if isinstance(step, (KernelStep, BatchStep)):
            cost, launch = _generated(step, part, device, describe)
            found.append(launch)
        elif isinstance(step, MatmulStep):
            cost, launch = _template(step, part, device, describe)
            found.append(launch)
        elif isinstance(step, AtenStep):
            cost, called = _called(step, part, device, specs)
            found += [] if called is None else [replace(called, templates=launched(step))]
        else:
            cost = Cost()
        specs |= made(step)
        total += cost
    return tuple(found), total


def _generated(
    step: KernelStep | BatchStep, part: Part, device: Device, describe: Describe
) -> tuple[Cost, Kernel]:
    cost, least, seconds = Cost(), 0, device.launch_s
    for extents in ({},) if isinstance(step, KernelStep) else step.extents():
        values = {name: round(value_of(size, part.hints)) for name, size in extents.items()}
        hints = {**part.hints, **values}
        moved = _traffic_cost(step.program, extents)
        cost += moved
        least += min(round(value_of(moved.bytes, hints)), buffers_once(step.program, hints))
        seconds += kernel_seconds(step.program, device, hints) - device.launch_s
    source, resources = describe(step)
    return cost, Kernel(
        name=step.name,
        graph=part.name,
        ops=step.nodes,
        where=step.where,
        bytes=round(value_of(cost.bytes, part.hints)),
        bound=least,
        flops=round(value_of(cost.flops, part.hints)),
        time_us=seconds * 1e6,
        tile=show_schedule(step.schedule),
        layout=", ".join(show_spec(spec) for _, spec in step.outputs[:4]),
        source=source,
        resources=resources,
        formula=_formula(cost.bytes),
        generated=True,
    )


def _template(
    step: MatmulStep, part: Part, device: Device, describe: Describe
) -> tuple[Cost, Kernel]:
    cost = matmul_cost(step.product, step.program)
    seconds = matmul_seconds(step.product, step.program, step.tile, device, part.hints)
    if seconds is None:  # the library's rate, where nothing is known of the template's
        seconds = time(cost, device, step.product.dtype, part.hints, products_rounded())
    source, resources = describe(step)
    total = round(value_of(cost.bytes, part.hints))
    return cost, Kernel(
        name=step.name,
        graph=part.name,
        ops=step.nodes,
        where=step.where,
        bytes=total,
        bound=min(total, _once(step.buffers, part.hints)),
        flops=round(value_of(cost.flops, part.hints)),
        time_us=seconds * 1e6,
        tile=show_tile(step.tile),
        layout=", ".join(show_spec(spec) for _, spec in step.outputs[:4]),
        source=source,
        resources=resources,
        formula=_formula(cost.bytes),
        generated=True,
    )


def _traffic_cost(program: TileProgram, extents: Mapping[str, Size]) -> Cost:
    """The traffic of one run; of a batch's member, at its own extents."""
    moved = at_extents(traffic(program), extents)
    return Cost(moved.read_bytes, moved.written_bytes, moved.flops, moved.transcendentals)


def buffers_once(program: TileProgram, hints: Mapping[str, int]) -> int:
    """Bytes of every buffer of a kernel read or written once, both for one updated in place."""
    return _once(program.buffers, hints)


def _once(buffers: Iterable[Buffer], hints: Mapping[str, int]) -> int:
    total = 0.0
    for buffer in buffers:
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
    tf32 = rounded(step.target)
    moved = cost.bytes + relaid_bytes(cost, device, dtype, tf32)
    return cost, Kernel(
        name=step.target,
        graph=part.name,
        ops=(step.node,) if step.node else (),
        where=(step.where,) if step.where else (),
        bytes=round(value_of(moved, part.hints)),
        bound=round(value_of(cost.bytes, part.hints)),
        flops=round(value_of(cost.flops, part.hints)),
        time_us=time(cost, device, dtype, part.hints, tf32) * 1e6,
        tile=step.reason,
        layout=", ".join(show_spec(spec) for spec in results[:4]),
        source=_source(step, part),
        formula=_formula(moved),
    )


def _source(step: AtenStep, part: Part) -> str:
    found = f"torch.ops.{step.target}"
    if step.product is None:
        return found
    measured = in_numbers(step.product, part.hints) in dict(part.plan.algorithms)
    return f"{found}, by addresses" + (", algorithm measured" if measured else "")


def _formula(moved: Size) -> str:
    return "" if isinstance(moved, (int, float)) else str(moved)
