"""Products by themselves that a step of the matmul template can make: added up in one sum, or
several of one operand in one launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from iocompiler.plan.contents import made
from iocompiler.plan.data import AtenStep, MatmulStep, ViewStep
from iocompiler.plan.factors import Factors, factors_of
from iocompiler.plan.groups import Member, Side, can_join, groups
from iocompiler.plan.look import Look
from iocompiler.plan.matrix import Made, NoEpilogue, stored
from iocompiler.plan.product import UNCHOSEN
from iocompiler.tile.program import Buffer


def sums(look: Look) -> Iterator[tuple[MatmulStep, tuple[int, ...]]]:
    """Of products that are added up, the step that makes them at once, and where they stand."""
    for place, step, factors in _products(look):
        if factors.more:
            yield _stored(look, "sum_of_products", step, factors), (place,)


def beside(look: Look) -> Iterator[tuple[MatmulStep, tuple[int, ...]]]:
    """Of products that share an operand, likewise."""
    counted = 0
    numbers = []  # of the steps that are no views, before each place
    for step in look.steps:
        counted += not isinstance(step, ViewStep)
        numbers.append(counted)
    members = {
        numbers[place]: Member(place, next(iter(made(step))), factors)
        for place, step, factors in _products(look)
        if can_join(step, factors)
    }
    for group, side in groups(members, lambda one, last: _may_wait(look, one, last)):
        calls = [(look.steps[each.place], each.factors) for each in group]
        title = "products_of_one_operand"
        steps = [_stored(look, title, s, f) for s, f in calls if isinstance(s, AtenStep)]
        yield _as_one(steps, side), tuple(each.place for each in group)


def _products(look: Look) -> Iterator[tuple[int, AtenStep, Factors]]:
    """What is part of no site; not in TF32, which the template cannot round to."""
    for place, step in enumerate(look.steps):
        if isinstance(step, AtenStep) and place not in look.taken:
            factors = factors_of(step, look.specs)
            if factors is not None and not factors.tf32:
                yield place, step, factors


def _may_wait(look: Look, one: Member, last: Member) -> bool:
    if one.name in look.roots(set(last.factors.reads)):
        return False
    try:
        look.check_order(last.place, look.steps[last.place], one.name, one.factors)
    except NoEpilogue:
        return False
    return True


def _stored(look: Look, title: str, step: AtenStep, factors: Factors) -> MatmulStep:
    """The call as a step that does no more than it."""
    ((name, spec),) = made(step).items()
    product = Made(
        frozenset(), spec.dtype, (factors.batch, factors.m, factors.n), factors.result,
        factors.added_to("bias0"), Buffer("product0", spec.dtype, "out", factors.elements),
    )  # fmt: skip
    added = (factors.added[0],) if factors.added is not None else ()
    return MatmulStep(
        title,
        look.product([factors]),
        stored(product),
        UNCHOSEN,
        (*factors.operands, *added, name),
        ((name, spec),),
        (step.node,),
        (step.where,) if step.where else (),
    )


def _as_one(steps: Sequence[MatmulStep], shared: Side) -> MatmulStep:
    """One step for several, which share an operand."""
    first, *others = steps
    further = tuple((replace(s.product, shares=shared), s.program) for s in others)
    return replace(
        first,
        product=replace(first.product, beside=further),
        args=tuple(arg for step in steps for arg in step.args),
        outputs=tuple(each for step in steps for each in step.outputs),
        nodes=tuple(node for step in steps for node in step.nodes),
        where=tuple(dict.fromkeys(line for step in steps for line in step.where)),
    )
