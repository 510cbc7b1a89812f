"""Products whose GELU is made of them, and which somebody else reads too, as a backward does: the
library stores both.

    y = addmm(bias, a, b); ...; z = kernel(gelu(y))  -->  z, y = addmm_gelu(bias, a, b); ...

The product is not read for it, and one launch is gone; the library's epilogue takes longer, as the
device's row says. GELU is that by tanh: the library knows no other. Where only the activation reads
the product, `passes/activations.py` has made them one call; kernels that compute more than it are
none of these. This holds for products by address only (`addressed.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from iocompiler.cost_model.device import Device
from iocompiler.cost_model.kernel import kernel_seconds
from iocompiler.cost_model.rules import call_seconds
from iocompiler.ops.aligned_mm import ALIGNED
from iocompiler.plan.addressed import ACTIVATED, DTYPES, library_product
from iocompiler.plan.data import AtenStep, KernelStep, Plan, Step, ViewStep
from iocompiler.plan.look import Look
from iocompiler.plan.residual import lies_as, walks
from iocompiler.plan.rules.functions import gelu_by_tanh
from iocompiler.plan.sizes import is_multiple
from iocompiler.tile.arrange import merge_axes
from iocompiler.tile.index import Affine, row_major
from iocompiler.tile.program import Buffer, Builder, Op, TileProgram


@dataclass(frozen=True)
class Activation:
    """A kernel that makes the GELU of a product, and nothing else.

    Attributes:
        product, kernel: the places of the two steps in the plan; the product's name.
        call: what makes both; ``result`` shows the activation as the kernel made it, where that is
            another shape.
    """

    product: int
    kernel: int
    name: str
    call: AtenStep
    result: tuple[ViewStep, ...]


def with_activations(plan: Plan, device: Device, hints: Mapping[str, int]) -> Plan:
    """The plan with all of them by the library, where the products stood.

    Args:
        hints: an example value for every size symbol.
    """
    found = {each.product: each for each in activations(plan, device, hints)}
    if not found:
        return plan
    kernels = {each.kernel: each for each in found.values()}
    steps: list[Step] = []
    gone: set[tuple[str, str]] = set()
    for place, step in enumerate(plan.steps):
        if place in found:
            steps += [found[place].call, *found[place].result]
        elif place in kernels and isinstance(step, KernelStep):
            gone |= {(kernels[place].name, node) for node in step.nodes}
        else:
            steps.append(step)
    kept = tuple(edge for edge in plan.unfused if (edge.producer, edge.consumer) not in gone)
    return replace(plan, steps=tuple(steps), unfused=kept)


def activations(plan: Plan, device: Device, hints: Mapping[str, int]) -> Iterator[Activation]:
    """Those of a plan whose results are not in place yet which are expected to gain, on a device
    of which it is known.
    """
    if torch.device(plan.device).type != "cuda" or device.gelu_beside_product is None:
        return
    look: Look | None = None
    taken: set[int] = set()
    for place, step in enumerate(plan.steps):
        if not isinstance(step, KernelStep) or not _is_gelu(step.program):
            continue
        look = look or Look(plan)
        found = _activation(look, plan.device, place, step)
        if found is None or found.product in taken:
            continue
        if _gains(look, found, step, device, hints):
            taken.add(found.product)
            yield found


def _activation(look: Look, device: str, place: int, step: KernelStep) -> Activation | None:
    (argument,) = (name for name, buffer in zip(step.args, step.buffers, strict=True)
                   if buffer.role == "in")  # fmt: skip
    name = look.root(argument)
    at = look.maker.get(name)
    maker = look.steps[at] if at is not None else None
    if at is None or not isinstance(maker, AtenStep) or maker.kwargs or step.over:
        return None
    bias_and_factors = {"aten.mm.default": (None, *maker.args), "aten.addmm.default": maker.args}
    spec = look.specs[name]
    if maker.target not in bias_and_factors or not walks(look, step, argument, spec):
        return None
    if not _is_read_elsewhere(look, name, place) or look.is_overwritten({name}, at, place):
        return None
    ((result, shown),) = step.outputs
    if result not in step.args or not lies_as(shown, spec):
        return None
    whole = result if shown == spec else look.unused(f"{result}_{maker.node or 'product'}")
    call = replace(
        maker,
        target=ACTIVATED,
        args=bias_and_factors[maker.target],
        outputs=((whole, spec), (name, spec)),
        is_tuple=True,
    )
    product = library_product(call, look.specs, device)
    if product is None:
        return None
    extents = (product.k, product.n)
    if not all(is_multiple(extent * spec.dtype.itemsize, ALIGNED) for extent in extents):
        return None
    behind = () if whole == result else (ViewStep(result, whole, shown),)
    return Activation(at, place, name, call, behind)


def _is_read_elsewhere(look: Look, name: str, place: int) -> bool:
    """Whether not only the step at ``place`` reads what ``name`` shows, or it is returned."""
    return look.readers[name] != [place] or look.last[name] != place


def _gains(
    look: Look, found: Activation, kernel: KernelStep, device: Device, hints: Mapping[str, int]
) -> bool:
    maker = look.steps[found.product]
    assert isinstance(maker, AtenStep)
    specs = look.specs
    apart = call_seconds(maker, specs, device, hints)
    apart += kernel_seconds(kernel.program, device, hints)
    return call_seconds(found.call, specs, device, hints) < apart


# --- the program


def _is_gelu(program: TileProgram) -> bool:
    """Whether it makes the GELU of a tensor by tanh, element by element, and does nothing else."""
    if [buffer.role for buffer in program.buffers] != ["in", "out"] or program.reduced:
        return False
    (dtype, *other) = {buffer.dtype for buffer in program.buffers}
    if other or dtype not in DTYPES:
        return False
    expected = _gelu(dtype)
    made, rounded = program.ops[: len(expected)], program.ops[len(expected) :]
    return (
        tuple(replace(op, buffer="", index=None) for op in made) == expected
        and [op.kind for op in rounded] == ["cast"] * (len(rounded) - 1) + ["store"]
        and all(op.inputs == (place,) for place, op in enumerate(rounded, len(made) - 1))
        and all(op.dtype in (dtype, torch.float32) and not op.fn for op in rounded)
        and _is_flat(program)
    )


def _is_flat(program: TileProgram) -> bool:
    """Whether all are read and written in the order of memory, from their first element on."""
    merged = merge_axes(program)
    order: Affine = row_major(merged.parallel)
    return all(op.index == order for op in merged.ops if op.kind in ("load", "store"))


@lru_cache
def _gelu(dtype: torch.dtype) -> tuple[Op, ...]:
    """The operations of such a program, as the operator's rule spells them, wherever they read."""
    builder = Builder()
    x = builder.load("x", Affine.of("x"), dtype)
    builder.store("y", Affine.of("x"), gelu_by_tanh(builder, builder.cast(x, torch.float32)))
    buffers = (Buffer("x", dtype, "in", 1), Buffer("y", torch.float32, "out", 1))
    *ops, _ = builder.program((), (), buffers).ops
    return tuple(replace(op, buffer="", index=None) for op in ops)
