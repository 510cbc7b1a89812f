"""Which products of one operand stand so near to each other that one launch can make them all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from iocompiler.plan.data import AtenStep
from iocompiler.plan.factors import Factors
from iocompiler.plan.sizes import equal

MOST = 4
WINDOW = 8
"""Steps between a product and the next of its group: operands of the first are held for so long."""
Side: TypeAlias = Literal["left", "right"]
_OPERATORS = ("aten.mm.default", "aten.addmm.default")


@dataclass(frozen=True)
class Member:
    """The product that the step at ``place`` makes."""

    place: int
    name: str
    factors: Factors


def groups(
    members: Mapping[int, Member], may_wait: Callable[[Member, Member], bool]
) -> Iterator[tuple[list[Member], Side]]:
    """Products to be made where the last of them stands, and the operand they share: "left" (layers
    of one input), or "right" (their weights' gradients).

    Args:
        members: by their place among the steps that are no views, in order.
        may_wait: whether the first product may be made where the second is.
    """
    left = dict(members)
    sides: tuple[Side, ...] = ("left", "right")
    for side in sides:
        for group in _sharing(left, side, may_wait):
            if len(group) > 1:
                yield group, side
                taken = {member.place for member in group}
                left = {at: each for at, each in left.items() if each.place not in taken}


def can_join(step: AtenStep, factors: Factors) -> bool:
    """Whether a launch of several can make the product."""
    return step.target in _OPERATORS and equal(factors.batch, 1)


def _sharing(
    members: Mapping[int, Member], side: Side, may_wait: Callable[[Member, Member], bool]
) -> list[list[Member]]:
    found: list[list[Member]] = []
    open_groups: dict[Hashable, tuple[int, list[Member]]] = {}
    for at, member in members.items():
        factors = member.factors
        key = (getattr(factors, side), factors.k, factors.dtype)
        last, group = open_groups.get(key, (at, []))
        near = at - last <= WINDOW and 0 < len(group) < MOST
        if not near or not all(may_wait(each, member) for each in group):
            group = []
            found.append(group)
        group.append(member)
        open_groups[key] = at, group
    return found
