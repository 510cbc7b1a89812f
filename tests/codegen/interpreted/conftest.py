"""Triton's interpreter, where it takes less than its compiler."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def _with_masks_of_bools() -> None:
    """Triton 3.9 broadcasts a scalar condition as int8, and refuses that as a mask."""
    from triton.runtime.interpreter import InterpreterBuilder

    for name in ("create_masked_load", "create_masked_store"):
        setattr(InterpreterBuilder, name, _converting(getattr(InterpreterBuilder, name)))


def _converting(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(builder: Any, *args: Any) -> Any:
        for arg in args:
            if str(getattr(getattr(arg, "dtype", None), "scalar", "")) == "int1":
                arg.data = arg.data.astype(bool)
        return method(builder, *args)

    return call


if os.environ.get("TRITON_INTERPRET") == "1":
    _with_masks_of_bools()
