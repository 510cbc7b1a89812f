"""What rules ask of the evaluation that they are part of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import sympy
from torch.fx import Node

from iocompiler.passes.attention.masks.places import At
from iocompiler.passes.attention.masks.values import Formula, Value


class Reading(Protocol):
    """Evaluates elements of one graph; ``bounds`` holds the size of each index in use."""

    bounds: dict[sympy.Symbol, sympy.Expr]

    def value(self, node: Any, at: At) -> Value: ...

    def operand(self, node: Any, at: At) -> Value: ...

    def opaque(self, node: Node, at: At) -> Value: ...

    def formula(self, value: Value) -> Formula | None: ...


Rule: TypeAlias = Callable[[Reading, Node, At], Value | None]
"""The element of an operator's result; None where it is not known at all."""
