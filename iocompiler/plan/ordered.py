"""Calls whose order is part of what the user wrote, though none reads another's result.

Collectives meet those of the other ranks in the order they are issued; random operators draw from
one generator; effects are seen from outside. Each waits for the one before it in the graph: the
plan, whatever it fuses and moves, issues them as the graph does, and so does the plan of every
other rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node

from iocompiler.graph import view

_COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "symm_mem", "_dtensor")
_WAIT = "_c10d_functional::wait_tensor"


def ordered(graph: Graph, opaque: Iterable[Node]) -> dict[Node, Node]:
    """For each call the one that must have run before it.

    Args:
        opaque: the calls of operators among the nodes of the graph, in any order.
    """
    calls = set(opaque)
    chain = [node for node in graph.nodes if node in calls and _is_ordered(node)]
    return dict(pairwise(reversed(chain)))


def _is_collective(node: Node) -> bool:
    """Whether the call communicates with other processes; a wait for one that does is none."""
    if not isinstance(node.target, OpOverload) or node.target._schema.name == _WAIT:
        return False
    return node.target.namespace in _COLLECTIVES


def _is_ordered(node: Node) -> bool:
    if isinstance(node.target, HigherOrderOperator):
        return True  # anything may stand in its functions
    return _is_collective(node) or view.is_random(node) or node.is_impure()
