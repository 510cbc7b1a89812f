"""Calls whose order is part of what the user wrote, though none reads another's result.

Collectives meet those of the other ranks in the order they are issued; random operators draw from
one generator; effects are seen from outside. Each waits for the one before it in the graph: the
plan, whatever it fuses and moves, issues them as the graph does, and so does the plan of every
other rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node

from iocompiler.graph import view

aten = torch.ops.aten

_COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "symm_mem", "_dtensor")
_WAIT = "_c10d_functional::wait_tensor"


def ordered(graph: Graph, opaque: Iterable[Node]) -> dict[Node, list[Node]]:
    """For each call what must run before it, besides the makers of what it reads.

    Args:
        opaque: the calls of operators among the nodes of the graph, in any order.
    """
    calls = set(opaque)
    chain = [node for node in graph.nodes if node in calls and _is_ordered(node)]
    before = {later: [earlier] for earlier, later in pairwise(chain)}
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        # what a collective reads may be overwritten once it is done, which its wait tells
        waits = [wait for wait in _waits(node.args[0]) if wait in calls]
        if waits:
            before.setdefault(node, []).extend(waits)
    return before


def is_collective(node: Node) -> bool:
    """Whether the call communicates with other processes; a wait for one that does is none."""
    if not isinstance(node.target, OpOverload) or node.target._schema.name == _WAIT:
        return False
    return node.target.namespace in _COLLECTIVES


def _is_ordered(node: Node) -> bool:
    if isinstance(node.target, HigherOrderOperator):
        return True  # anything may stand in its functions
    return is_collective(node) or view.is_random(node) or node.is_impure()


def _waits(target: object) -> Iterator[Node]:
    """The waits for the collectives that read ``target``, or views of it."""
    seen = [target]
    while seen:
        node = seen.pop()
        for user in node.users if isinstance(node, Node) else ():
            if is_collective(user):
                yield from (wait for wait in _results_of(user) if _is_wait(wait))
            elif view.is_view(user):
                seen.append(user)


def _results_of(node: Node) -> Iterator[Node]:
    for user in node.users:
        yield user
        if user.op == "call_function" and not isinstance(user.target, OpOverload):
            yield from _results_of(user)  # a getitem


def _is_wait(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.name == _WAIT
