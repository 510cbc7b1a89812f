"""Products that a kernel adds one tensor to, and nothing else: the library adds it where it stores
the product.

    y = mm(a, b); ...; z = kernel(y + x)  -->  z = addmm(x, a, b); ...

The product is neither written nor read again, and one launch is gone: less of everything, so
nothing is asked of prices. This holds for products by address only (`addressed.py`): aten copies
what is added into the result first. The sum is rounded once where it was rounded twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from iocompiler.plan.addressed import DTYPES, library_product
from iocompiler.plan.data import AtenStep, KernelStep, Plan, Ref, Step, TensorSpec, ViewStep
from iocompiler.plan.look import Look
from iocompiler.plan.sizes import equal
from iocompiler.tile.arrange import merge_axes
from iocompiler.tile.index import Affine, Size, product, row_major
from iocompiler.tile.program import Op, TileProgram

_WITH_ADDED = {
    "aten.mm.default": "aten.addmm.default",
    "aten.bmm.default": "aten.baddbmm.default",
}


@dataclass(frozen=True)
class Residual:
    """A kernel that adds a tensor to a product.

    Attributes:
        product, kernel: the places of the two steps in the plan; the product's name.
        call: what makes the sum, from ``views``, which stand before it; ``result`` shows the sum as
            the kernel made it, where that is another shape.
    """

    product: int
    kernel: int
    name: str
    views: tuple[ViewStep, ...]
    call: AtenStep
    result: tuple[ViewStep, ...]


def with_residuals(plan: Plan) -> Plan:
    """The plan with all of them by the library, where the products stood."""
    found = list(residuals(plan))
    if not found:
        return plan
    look = Look(plan)
    at_product = {each.product: each for each in found}
    kernels = {each.kernel for each in found}
    names = {each.name for each in found}
    steps: list[Step] = []
    for place, step in enumerate(plan.steps):
        if place in at_product:
            each = at_product[place]
            steps += [*each.views, each.call, *each.result]
        elif place not in kernels and not (
            isinstance(step, ViewStep) and look.root(step.name) in names
        ):
            steps.append(step)
    gone = {(each.name, node) for each in found for node in _nodes(plan.steps[each.kernel])}
    kept = tuple(edge for edge in plan.unfused if (edge.producer, edge.consumer) not in gone)
    return replace(plan, steps=tuple(steps), unfused=kept)


def _nodes(step: Step) -> tuple[str, ...]:
    return step.nodes if isinstance(step, KernelStep) else ()


def residuals(plan: Plan) -> Iterator[Residual]:
    """Those of a plan whose results are not in place yet."""
    if torch.device(plan.device).type != "cuda":
        return
    look: Look | None = None
    taken: set[int] = set()
    for place, step in enumerate(plan.steps):
        if not isinstance(step, KernelStep) or not _is_sum(step.program):
            continue
        look = look or Look(plan)
        for product_buffer in (0, 1):
            found = _residual(look, plan.device, place, step, product_buffer)
            if found is not None and found.product not in taken:
                taken.add(found.product)
                yield found
                break


def _residual(look: Look, device: str, place: int, step: KernelStep, which: int) -> Residual | None:
    """The kernel as one that adds to its argument number ``which``, a product."""
    arguments = [name for name, buffer in zip(step.args, step.buffers, strict=True)
                 if buffer.role == "in"]  # fmt: skip
    name, other = look.root(arguments[which]), arguments[1 - which]
    at = look.maker.get(name)
    maker = look.steps[at] if at is not None else None
    if at is None or not isinstance(maker, AtenStep) or maker.target not in _WITH_ADDED:
        return None
    spec = look.specs[name]
    if maker.kwargs or not is_whole(look, arguments[which], spec, step) or step.over:
        return None
    if not _is_read_once(look, name, at, place):
        return None
    base = _base(look, other)
    if base is None or look.maker.get(base, -1) >= at or look.is_overwritten({base}, at, place):
        return None
    ((result, shown),) = step.outputs
    views, added = _view(look, f"{result}_added", base, spec, look.offset(other))
    whole = result if shown == spec else unused(f"{result}_{maker.node or 'sum'}", look)
    call = replace(
        maker,
        target=_WITH_ADDED[maker.target],
        args=(Ref(added), *maker.args),
        outputs=((whole, spec),),
    )
    specs = {**look.specs, added: spec}
    if library_product(call, specs, device) is None:
        return None
    behind = () if whole == result else (ViewStep(result, whole, shown),)
    return Residual(at, place, name, views, call, behind)


def is_whole(look: Look, argument: str, spec: TensorSpec, step: KernelStep) -> bool:
    """Whether the kernel reads all of a product, element by element from its first, and makes as
    much.
    """
    rows = tuple(product(spec.shape[dim + 1 :]) for dim in range(len(spec.shape)))
    if not all(map(equal, spec.stride, rows)) or len(step.outputs) != 1:
        return False
    ((result, shown),) = step.outputs
    if shown.dtype != spec.dtype or shown.device != spec.device or result not in step.args:
        return False
    count = product(spec.shape)
    extents = product([axis.size for axis in step.program.parallel])
    return (
        equal(look.offset(argument), 0)
        and equal(count, extents)
        and equal(count, product(shown.shape))
        and equal(count, shown.reach)
    )


def _is_read_once(look: Look, name: str, at: int, place: int) -> bool:
    """Whether only the step at ``place`` reads what the one at ``at`` makes."""
    return look.last.get(name) == place and look.readers[name] == [place] and at < place


def _base(look: Look, name: str) -> str | None:
    """The value in whose memory one lies; None where that is of another dtype, or a call's to tell,
    which tells no offset.
    """
    root = name
    while root in look.views:
        root = look.views[root].base
    told = root == look.root(name) and look.specs[root].dtype == look.specs[name].dtype
    return root if told else None


def _view(
    look: Look, wish: str, base: str, spec: TensorSpec, offset: Size
) -> tuple[tuple[ViewStep, ...], str]:
    """What lies in a value's memory, seen as ``spec``: the view to be made, if any; its name."""
    if look.specs[base] == spec and equal(offset, 0):
        return (), base
    name = unused(wish, look)
    return (ViewStep(name, base, spec, offset),), name


def unused(wish: str, look: Look) -> str:
    while wish in look.specs:
        wish += "_"
    return wish


# --- the program


def _is_sum(program: TileProgram) -> bool:
    """Whether it adds two tensors of one short dtype, element by element, and does nothing else."""
    kinds = sorted(op.kind for op in program.ops if op.kind != "cast")
    dtypes = {buffer.dtype for buffer in program.buffers}
    if kinds != ["load", "load", "map", "store"] or program.reduced or len(dtypes) != 1:
        return False
    (dtype,) = dtypes
    if dtype not in DTYPES or [b.role for b in program.buffers] != ["in", "in", "out"]:
        return False
    if any(op.dtype not in (dtype, torch.float32) for op in program.ops):
        return False
    return _adds(program.ops) and is_flat(program)


def _adds(ops: tuple[Op, ...]) -> bool:
    def behind(value: int) -> int:
        """What a value is, but for its rounding."""
        while ops[value].kind == "cast":
            (value,) = ops[value].inputs
        return value

    (store,) = (op for op in ops if op.kind == "store")
    if store.fn or len(store.inputs) != 1:
        return False
    total = ops[behind(store.inputs[0])]
    if total.kind != "map" or total.fn != "add" or total.dtype != torch.float32:
        return False
    loads = [ops[behind(value)] for value in total.inputs]
    names = {load.buffer for load in loads if load.kind == "load" and not load.inputs}
    return len(names) == 2


def is_flat(program: TileProgram) -> bool:
    """Whether all are read and written in the order of memory, from their first element on."""
    merged = merge_axes(program)
    order: Affine = row_major(merged.parallel)
    return all(op.index == order for op in merged.ops if op.kind in ("load", "store"))
