"""When two calls are the same call: what a call is given, as a key."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch


def frozen(argument: Any) -> Hashable:
    """The argument as a key: numbers of different types differ, and so do the two zeros."""
    if isinstance(argument, (list, tuple)):
        return tuple(frozen(each) for each in argument)
    if isinstance(argument, dict):
        return tuple((name, frozen(argument[name])) for name in sorted(argument))
    if isinstance(argument, (bool, int, float, complex)):
        return type(argument).__name__, repr(argument)
    if isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return "symbol", argument.node.expr
    if isinstance(argument, slice):
        return "slice", frozen((argument.start, argument.stop, argument.step))
    return argument  # type: ignore[no-any-return]
