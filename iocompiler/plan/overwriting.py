"""Calls that write into their first argument and return it: what they store, and into what.

``copy_`` writes all of it, the others some places of an input (`passes/updates.py` leaves them):
what reads their result reads the input's memory, after them.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from iocompiler.graph import in_part

aten = torch.ops.aten

COPY = aten.copy_.default
IN_PART = dict(in_part.IN_PART.values())
"""Those that write some places, and which argument they write."""


def overwritten(node: Node) -> Node | None:
    """What a call writes into; None where it writes into nothing."""
    if node.target is COPY or writes_in_part(node):
        target = node.args[0]
        assert isinstance(target, Node)
        return target
    return None


def writes_in_part(node: Node) -> bool:
    """Whether a call overwrites some places of its first argument, and leaves the others."""
    return node.op == "call_function" and node.target in IN_PART


def stored_into(output: Node) -> Node:
    """The node whose buffer an output is stored into: itself, or what a call overwrites."""
    return overwritten(output) or output


def elements_of(output: Node) -> Node:
    """The node whose elements an output stores, one by one: itself, or what is written in part."""
    if not writes_in_part(output):
        return output
    place = IN_PART[output.target]  # type: ignore[index]
    given = output.args[place] if place < len(output.args) else None
    return given if isinstance(given, Node) else output
