"""The order in which groups and opaque calls run."""

from __future__ import annotations

import heapq

from torch.fx import Node

from iocompiler.plan.dataflow import Dataflow
from iocompiler.plan.group import Group, Grouper


def in_order(flow: Dataflow, grouper: Grouper, groups: list[Group]) -> list[Group | Node]:
    """A topological order near to the graph's own: buffers then die about where they did."""
    units: dict[int, Group | Node] = {g.number: g for g in groups}
    units |= {grouper.home[n]: n for n in flow.opaque}
    place = {number: _place(flow, unit) for number, unit in units.items()}
    waiting = {number: bin(grouper.above(number)).count("1") for number in units}
    below: dict[int, list[int]] = {number: [] for number in units}
    for number in units:
        mask = grouper.above(number)
        while mask:
            low = mask & -mask
            below[low.bit_length() - 1].append(number)
            mask ^= low
    ready = [(place[n], n) for n, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    ordered: list[Group | Node] = []
    while ready:
        _, number = heapq.heappop(ready)
        ordered.append(units[number])
        for user in below[number]:
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(ready, (place[user], user))
    assert len(ordered) == len(units), "the kernels depend on each other in a circle"
    return ordered


def _place(flow: Dataflow, unit: Group | Node) -> int:
    if isinstance(unit, Node):
        return flow.order[unit]
    return max(flow.order[n] for n in unit.nodes)
