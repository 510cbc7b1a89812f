"""How large numbers beside scores may be, and how negative one has to be for what."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from iocompiler.graph import view
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.masks.evaluate import Evaluator
from iocompiler.passes.attention.masks.places import At
from iocompiler.passes.attention.masks.values import Bounds, magnitude

DROWNS = -1e8
"""A score or bias added to this is lost in rounding."""

MOST_NEGATIVE = -1e30
"""Instead of the most negative number: times log2(e) it does not overflow, and a score added to it
is lost all the same.
"""

LARGEST = 1e4
"""No learned bias is larger."""


def reach(node: Node, at: At, evaluator: Evaluator, bounds: Bounds) -> float:
    """What no element of a tensor exceeds, either way; of learned numbers, seen through views and
    casts, the largest there are.
    """
    root: Any = node
    while root.op == "call_function" and root.target in (*views.VIEWS, *views.CASTS):
        root = root.args[0]
    if root.meta.get("parameter") or root.meta.get("requires_grad") or requires_grad(root):
        return LARGEST
    return magnitude(evaluator.element(node, at, bounds))


def requires_grad(node: Node) -> bool:
    """Whether the tensor itself wants a gradient."""
    return bool(getattr(view.value(node), "requires_grad", False))
