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
_WAIT = "wait_tensor"


def ordered(graph: Graph, opaque: Iterable[Node]) -> dict[Node, Node]:
    """For each call the one that must have run before it.

    Args:
        opaque: the calls of operators among the nodes of the graph, in any order.
    """
    calls = set(opaque)
    chain = [node for node in graph.nodes if node in calls and _is_ordered(node)]
    return dict(pairwise(reversed(chain)))


def is_collective(target: str) -> bool:
    """Whether the operator (as "namespace.name.overload") communicates with other processes; a wait
    for one that does is none.
    """
    namespace, name = target.split(".")[:2]
    return namespace in _COLLECTIVES and name != _WAIT


def _is_ordered(node: Node) -> bool:
    if isinstance(node.target, HigherOrderOperator):
        return True  # anything may stand in its functions
    communicates = isinstance(node.target, OpOverload) and is_collective(str(node.target))
    return communicates or view.is_random(node) or node.is_impure()
