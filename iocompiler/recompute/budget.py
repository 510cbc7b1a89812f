"""The fastest partition of a training step whose scheduled peak stays within a budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

from torch.fx import GraphModule, Node

from iocompiler.cost_model.device import Device
from iocompiler.errors import BudgetWarning
from iocompiler.graph.view import copied, where
from iocompiler.ops.partition import Saved, partition, partition_again, saved
from iocompiler.plan.build import build_plan, size_hints
from iocompiler.plan.data import Plan
from iocompiler.plan.donated import donated
from iocompiler.plan.inplace import in_place
from iocompiler.plan.padding import adopt_strides, pad_rows
from iocompiler.plan.peak import kept, scheduled_peak
from iocompiler.plan.priced import chosen_by_price, priced
from iocompiler.plan.product import MatmulTile
from iocompiler.plan.sites import SiteKey
from iocompiler.recompute.candidates import candidates
from iocompiler.recompute.trade import Again, Point, Trade
from iocompiler.report.build import Part, build_report
from iocompiler.runtime import tangents

Parts = tuple[GraphModule, GraphModule]
Budget = int | float
"""Bytes; or, as a float, a fraction of the unconstrained peak."""


@dataclass(frozen=True)
class _Tried:
    point: Point
    parts: Parts

    @property
    def saved(self) -> tuple[Saved, ...]:
        return saved(*self.parts)


@dataclass(frozen=True)
class Budgeted:
    """For AOTAutograd's ``partition_fn``: `ops.partition.partition` within a budget.

    Attributes:
        device: prices time.
        prepare: what happens to a flat graph, by its name, before it is planned.
        note: called with the trade that was made.
        lazy: tangents of results beside a loss are taken as absent (`runtime/tangents.py`).
    """

    budget: Budget
    device: Callable[[GraphModule], Device]
    prepare: Callable[[GraphModule, str], None]
    note: Callable[[Trade], None]
    lazy: bool = True

    def __call__(self, joint: GraphModule, inputs: Any, **keywords: Any) -> Parts:
        if not inputs:  # a region inside of the graph; its memory is its caller's
            return partition(joint, inputs, **keywords)
        joint.graph.eliminate_dead_code()
        device, outputs = self.device(joint), keywords["num_fwd_outputs"]
        tried: list[_Tried] = []
        tiles: dict[SiteKey, MatmulTile] = {}
        for each in candidates(joint, outputs, device, size_hints(joint)):
            parts = partition_again(joint, inputs, each.again, each.keep, each.relaxed, **keywords)
            kept_here = saved(*parts)
            if kept_here not in [other.saved for other in tried]:
                point = self._point(each.name, parts, outputs, device, tiles)
                tried.append(_Tried(point, parts))
        trade, chosen = _traded(tried, self.budget)
        if not trade.fits:
            _warn(trade)
        self.note(trade)
        return chosen.parts

    def _point(
        self,
        name: str,
        parts: Parts,
        outputs: int,
        device: Device,
        tiles: dict[SiteKey, MatmulTile],
    ) -> Point:
        """What a partition would come to: both graphs are planned, on copies, as they will be."""
        forward, backward = map(copied, parts)
        handed_over = kept(forward, backward)
        self.prepare(forward, "forward")
        pad_rows(forward, outputs, device)
        (output,) = forward.graph.find_nodes(op="output")
        values = {name: output.args[0][at].meta["val"] for name, at in handed_over.items()}
        given = [
            values.get(node.name, node.meta.get("val"))
            for node in backward.graph.find_nodes(op="placeholder")
        ]
        absent = _unlikely(backward) if self.lazy else ()
        if absent:
            backward, given = tangents.without(backward, given, absent)
        self.prepare(backward, "backward")
        adopt_strides(backward, given)
        pad_rows(backward, None, device)
        hints = {**size_hints(forward), **size_hints(backward)}

        def planned(gm: GraphModule, name: str, own: Collection[str] = ()) -> Plan:
            plan = build_plan(gm, device, name)
            return in_place(chosen_by_price(plan, priced(plan, device, hints, tiles)), own)

        first = planned(forward, "forward")
        plans = first, planned(backward, "backward", donated(first, handed_over))
        named = zip(("forward", "backward"), plans, strict=True)
        report = build_report([Part(name, plan, hints) for name, plan in named], device)
        return Point(
            name,
            scheduled_peak(*plans, handed_over, hints),
            report.time_us,
            sum(each.bytes for each in saved(*parts)),
        )


def _unlikely(backward: GraphModule) -> tangents.Absent:
    """The tangents of what stands beside a loss: all that are no scalars, where one is."""
    inputs = backward.graph.find_nodes(op="placeholder")
    positions = tangents.of(backward)
    scalars = [at for at in positions if inputs[at].meta["val"].dim() == 0]
    return tuple(at for at in positions if at not in scalars) if scalars else ()


def _traded(tried: list[_Tried], budget: Budget) -> tuple[Trade, _Tried]:
    points = tuple(each.point for each in tried)
    limit = allowed(points, budget)
    chosen = tried[points.index(choice(points, limit))]
    return Trade(limit, chosen.point, points[0], _again(tried[0], chosen), points), chosen


def allowed(points: Sequence[Point], budget: Budget) -> int:
    """The budget in bytes; the first point is the unconstrained one."""
    return int(budget * points[0].peak) if isinstance(budget, float) else budget


def choice(points: Sequence[Point], limit: int) -> Point:
    """The fastest within the limit, else the one with the lowest peak.

    What fits a smaller limit also fits a larger one, whose choice is either the same or has a
    higher peak than the smaller one allows: less budget never gives a higher peak.
    """
    fitting = [point for point in points if point.peak <= limit]
    if fitting:
        return min(fitting, key=lambda point: (point.time_us, point.peak))
    return min(points, key=lambda point: (point.peak, point.time_us))


def _again(first: _Tried, chosen: _Tried) -> tuple[Again, ...]:
    left = {each.name for each in chosen.saved}
    nodes = {node.name: node for node in first.parts[0].graph.nodes}
    gone = ((each, nodes[each.name]) for each in first.saved if each.name not in left)
    return tuple(Again(e.name, str(_maker(n).target), e.bytes, where(n)) for e, n in gone)


def _maker(node: Node) -> Node:
    return node.all_input_nodes[0] if node.target is getitem else node


def _warn(trade: Trade) -> None:
    warnings.warn(
        f"iocompiler: memory_budget allows {trade.allowed} bytes, the least found for a training "
        f"step are {trade.chosen.peak} bytes: these are taken",
        BudgetWarning,
        stacklevel=2,
    )
