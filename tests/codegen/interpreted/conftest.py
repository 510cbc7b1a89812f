"""Triton's interpreter, where it takes less than its compiler."""

from __future__ import annotations

import os
from typing import Any


def _with_masks_of_bools() -> None:
    """Triton 3.9 broadcasts a scalar condition as int8, and refuses that as a mask."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    def as_bools(mask: Any) -> Any:
        if not isinstance(mask, TensorHandle):
            return mask  # of a descriptor
        return TensorHandle(mask.data.astype(bool), mask.dtype)

    load, store = Builder.create_masked_load, Builder.create_masked_store
    Builder.create_masked_load = lambda self, pointers, mask, *rest, **named: load(
        self, pointers, as_bools(mask), *rest, **named
    )
    Builder.create_masked_store = lambda self, pointers, value, mask, *rest, **named: store(
        self, pointers, value, as_bools(mask), *rest, **named
    )


if os.environ.get("TRITON_INTERPRET") == "1":
    _with_masks_of_bools()
