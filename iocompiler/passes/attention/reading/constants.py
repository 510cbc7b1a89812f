"""Numbers that are written in a graph, in whatever form."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.reading.description import Inverse

aten = torch.ops.aten


def number(value: Any) -> float | None:
    """`constant`, or a symbolic number the graph is then guarded on: a module's scale or dropout is
    as good as constant.
    """
    if isinstance(value, Node) and isinstance(view.value(value), (torch.SymFloat, float, int)):
        try:
            return float(view.value(value))
        except Exception:  # known at run time only
            return None
    return constant(value)


def literal(factor: Any) -> float | None:
    """The number a factor is, None where it is known at run time only."""
    if isinstance(factor, Inverse):
        below = literal(factor.of)
        return None if below is None or below == 0.0 else 1.0 / below
    return number(factor)


def constant(value: Any) -> float | None:
    """The number a value is: a Python one, or a tensor of one element made from one."""
    if isinstance(value, (int, float)):
        return float(value)
    while isinstance(value, Node) and value.op == "call_function":
        if value.target in (aten.full.default, aten.scalar_tensor.default, aten.full_like.default):
            made = value.args[0] if value.target is aten.scalar_tensor.default else value.args[1]
            return float(made) if isinstance(made, (int, float)) else None
        if value.target not in (
            *views.CASTS,
            *views.VIEWS,
            aten.to.device,
            aten.lift_fresh_copy.default,
            aten.detach_.default,
        ):
            return None
        value = value.args[0]
    if isinstance(value, Node) and value.op == "get_attr":
        held = getattr(value.graph.owning_module, str(value.target), None)
        if isinstance(held, torch.Tensor) and held.numel() == 1 and not _is_fake(held):
            return float(held)
    return None


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)
