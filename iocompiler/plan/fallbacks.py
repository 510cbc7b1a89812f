"""Under ``no_fallback``: no call of aten may write more than the user allows."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from iocompiler.errors import FallbackTooLarge
from iocompiler.plan.build import size_hints
from iocompiler.plan.data import AtenStep, Plan
from iocompiler.plan.dataflow import LIBRARY_REASONS, WHY, nbytes


def check_fallbacks(plan: Plan, gm: GraphModule, allowed: int) -> None:
    """Look at every plain call of the plan of ``gm`` but those that a library does best.

    Raises:
        FallbackTooLarge: one writes more than ``allowed`` bytes, at the example sizes.
    """
    nodes, hints = {node.name: node for node in gm.graph.nodes}, size_hints(gm)
    for step in plan.steps:
        if not isinstance(step, AtenStep) or step.reason.partition(WHY)[0] in LIBRARY_REASONS:
            continue
        node = nodes[step.node]
        written = 0 if _is_view(node) else nbytes(node, hints)
        if written > allowed:
            raise FallbackTooLarge(
                node=step.node,
                operator=step.target,
                reason=step.reason,
                bytes=written,
                allowed=allowed,
                where=step.where,
            )


def _is_view(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(
        result.alias_info is not None and not result.alias_info.is_write
        for result in target._schema.returns
    )
