"""Products that a kernel adds a tensor to, a bias, or both, before anything else: the library adds
them where it stores the product.

    y = mm(a, b); z = kernel(y + x)               -->  z = addmm(x, a, b)
    y = mm(a, b); z, n = kernel(z = y + x, f(z))  -->  z = addmm(x, a, b); n = kernel(f(z))

The product is neither written nor read again. Where the kernel does no more than add, a launch is
gone; where it does more, it reads one tensor for two and stores one less. Either way it is less of
everything, so nothing is asked of prices. This holds for products by address only
(`addressed.py`): aten copies what is added into the result first. The sum is rounded once where it
was rounded twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from iocompiler.cost_model.device import Device
from iocompiler.cost_model.schedule import choose
from iocompiler.ops.biased_addmm import BIASED_ADDMM
from iocompiler.plan.addressed import DTYPES, library_product
from iocompiler.plan.data import (
    AtenStep,
    KernelStep,
    Plan,
    Ref,
    Step,
    TensorSpec,
    Unfused,
    ViewStep,
)
from iocompiler.plan.first_sum import FirstSum, first_sum
from iocompiler.plan.look import Look
from iocompiler.plan.sizes import equal
from iocompiler.tile.index import Size, product
from iocompiler.tile.program import TileProgram

_WITH_ONE = {
    "aten.mm.default": "aten.addmm.default",
    "aten.bmm.default": "aten.baddbmm.default",
}
_WITH_BOTH = ("aten.mm.default", "aten.addmm.default")


@dataclass(frozen=True)
class Residual:
    """A kernel that begins with the sum of a product and what is added to it.

    Attributes:
        product, kernel: the places of the two steps in the plan; the product's name.
        call: what makes the sum, from ``views``, which stand before it; ``result`` shows the sum as
            the kernel made it, where that is another shape.
        total: the sum's name.
        rest: what the kernel does with the sum, if anything, in the schedule it had.
    """

    product: int
    kernel: int
    name: str
    views: tuple[ViewStep, ...]
    call: AtenStep
    result: tuple[ViewStep, ...]
    total: str
    rest: KernelStep | None


def with_residuals(plan: Plan, device: Device, hints: Mapping[str, int]) -> Plan:
    """The plan with all of them by the library, where the products stood.

    Args:
        device, hints: for the schedules of kernels of which something is left.
    """
    found = list(residuals(plan))
    if not found:
        return plan
    look = Look(plan)
    at_product = {each.product: each for each in found}
    at_kernel = {each.kernel: each for each in found}
    names = {each.name for each in found}
    steps: list[Step] = []
    for place, step in enumerate(plan.steps):
        if place in at_product:
            each = at_product[place]
            steps += [*each.views, each.call, *each.result]
        elif place in at_kernel:
            rest = at_kernel[place].rest
            if rest is not None:
                assert isinstance(step, KernelStep)
                steps.append(_rescheduled(rest, step.program, device, hints))
        elif not (isinstance(step, ViewStep) and look.root(step.name) in names):
            steps.append(step)
    return replace(plan, steps=tuple(steps), unfused=tuple(_edges(plan, found)))


def _rescheduled(
    step: KernelStep, before: TileProgram, device: Device, hints: Mapping[str, int]
) -> KernelStep:
    """With the model's schedule, if that was what it had for its program ``before``; one that was
    measured stays.
    """
    model, now = (choose(program, device, hints) for program in (before, step.program))
    return replace(step, schedule=now) if step.schedule == model else step


def _edges(plan: Plan, found: list[Residual]) -> Iterator[Unfused]:
    """What passes through memory: the sum in the product's place, where a kernel still reads it."""
    kernels = {each.name: each for each in found}
    for edge in plan.unfused:
        each = kernels.get(edge.producer)
        step = plan.steps[each.kernel] if each is not None else None
        if each is None or not isinstance(step, KernelStep) or edge.consumer not in step.nodes:
            yield edge
        elif each.rest is not None:
            reason = f"{each.total} comes from a call: {each.call.reason}"
            for reader in each.rest.nodes[:1]:
                yield replace(edge, producer=each.total, consumer=reader, reason=reason)


def residuals(plan: Plan) -> Iterator[Residual]:
    """Those of a plan whose results are not in place yet."""
    if torch.device(plan.device).type != "cuda":
        return
    look: Look | None = None
    taken: set[int] = set()
    for place, step in enumerate(plan.steps):
        if not isinstance(step, KernelStep) or step.over:
            continue
        look = look or Look(plan)
        for argument, buffer in zip(step.args, step.buffers, strict=True):
            if buffer.role != "in" or buffer.dtype not in DTYPES:
                continue
            found = _Kernel(look, plan, place, step).residual(argument, buffer.name)
            if found is not None and found.product not in taken:
                taken.add(found.product)
                yield found
                break


@dataclass(frozen=True)
class _Kernel:
    """The kernel at a place of a plan."""

    look: Look
    plan: Plan
    place: int
    step: KernelStep

    def residual(self, argument: str, buffer: str) -> Residual | None:
        """It as one that begins with a sum of its ``argument``, a product."""
        look, step = self.look, self.step
        name = look.root(argument)
        at = look.maker.get(name)
        maker = look.steps[at] if at is not None else None
        if at is None or not isinstance(maker, AtenStep) or maker.kwargs:
            return None
        if maker.target not in (*_WITH_ONE, *_WITH_BOTH) or not self._alone_reads(name, at):
            return None
        spec = look.specs[name]
        total = self._sum(argument, buffer, spec)
        if total is None:
            return None
        arguments = dict(zip((b.name for b in step.buffers), step.args, strict=True))
        result = arguments[total.stored]
        shown = dict(step.outputs).get(result)
        if shown is None or not lies_as(shown, spec):
            return None
        added: list[Ref] = []
        views: list[ViewStep] = []
        row = replace(spec, shape=spec.shape[-1:], stride=(1,))
        for kind, read, like in (("added", total.added, spec), ("bias", total.bias, row)):
            if read is not None:
                shows = self._shown(arguments[read], f"{result}_{kind}", like, at)
                if shows is None:
                    return None
                views += shows[0]
                added.append(Ref(shows[1]))
        whole = result if shown == spec else look.unused(f"{result}_{maker.node or 'sum'}")
        call = replace(maker, outputs=((whole, spec),))
        made = self._call(call, tuple(added), {view.name: view.spec for view in views})
        if made is None:
            return None
        behind = () if whole == result else (ViewStep(result, whole, shown),)
        arguments[buffer] = result
        readers = {edge.consumer for edge in self.plan.unfused if edge.producer == name}
        rest = self._rest(total.rest, arguments, result, {result, *readers})
        return Residual(at, self.place, name, tuple(views), made, behind, result, rest)

    def _sum(self, argument: str, buffer: str, spec: TensorSpec) -> FirstSum | None:
        """The sum of all of a product, which the kernel reads from its first element on."""
        if not walks(self.look, self.step, argument, spec):
            return None
        return first_sum(self.step.program, buffer, spec.shape[-1])

    def _alone_reads(self, name: str, at: int) -> bool:
        """Whether nothing else reads what the step at ``at`` makes, and this as one argument."""
        look, place = self.look, self.place
        if [look.root(each) for each in self.step.args].count(name) != 1:
            return False
        return look.last.get(name) == place and look.readers[name] == [place] and at < place

    def _shown(
        self, name: str, wish: str, spec: TensorSpec, at: int
    ) -> tuple[tuple[ViewStep, ...], str] | None:
        """What is added, seen as ``spec``, as it is there at the place ``at``: the view to be made,
        if any; its name. None where it is not there yet, or not the same any more.
        """
        look = self.look
        base = _base(look, name)
        if base is None or look.maker.get(base, -1) >= at:
            return None
        if look.specs[base].dtype != spec.dtype or look.specs[base].device != spec.device:
            return None
        if look.is_overwritten({base}, at, self.place):
            return None
        return _view(look, wish, base, spec, look.offset(name))

    def _call(
        self, maker: AtenStep, added: tuple[Ref, ...], views: Mapping[str, TensorSpec]
    ) -> AtenStep | None:
        """The product's call with what is added to it, if the library takes that."""
        every = (*added, *maker.args)
        target = _WITH_ONE.get(maker.target) if len(every) == 3 else None
        if len(every) == 4 and maker.target in _WITH_BOTH:
            target = str(BIASED_ADDMM)
        if target is None:
            return None
        call = replace(maker, target=target, args=every)
        specs = {**self.look.specs, **views}
        return call if library_product(call, specs, self.plan.device) is not None else None

    def _rest(
        self,
        program: TileProgram | None,
        arguments: Mapping[str, str],
        total: str,
        summing: set[str],
    ) -> KernelStep | None:
        """What is left of the kernel, without the nodes that are ``summing``."""
        step = self.step
        if program is None:
            return None
        return replace(
            step,
            program=program,
            args=tuple(arguments[each.name] for each in program.buffers),
            outputs=tuple(each for each in step.outputs if each[0] != total),
            nodes=tuple(node for node in step.nodes if node not in summing),
        )


def walks(look: Look, step: KernelStep, argument: str, spec: TensorSpec) -> bool:
    """Whether a kernel visits as many elements as a product, which lies by rows, has, and reads it
    from the first one on.
    """
    rows = tuple(product(spec.shape[dim + 1 :]) for dim in range(len(spec.shape)))
    points = product([axis.size for axis in step.program.axes])
    by_rows = all(map(equal, spec.stride, rows)) and equal(look.offset(argument), 0)
    return by_rows and equal(product(spec.shape), points)


def lies_as(shown: TensorSpec, spec: TensorSpec) -> bool:
    """Whether a kernel's result can be memory of a product's, as much and filled as it."""
    if (shown.dtype, shown.device) != (spec.dtype, spec.device):
        return False
    count = product(spec.shape)
    return equal(count, product(shown.shape)) and equal(count, shown.reach)


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
    name = look.unused(wish)
    return (ViewStep(name, base, spec, offset),), name
