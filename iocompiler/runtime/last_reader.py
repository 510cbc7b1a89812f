"""Whether a backward that runs now is the last to read what its forward saved, so that it may write
there.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor


def is_last_reader(x: Tensor, others: int = 0) -> bool:
    """True in a backward whose graph is not kept, where nobody else has the tensor or its memory.

    A graph is kept under ``retain_graph=True`` and ``create_graph=True``. Outside of autograd, where
    somebody calls a backward by hand or a generated file is run by itself, it counts as kept; and so
    it does while a CUDA graph is recorded, which replays without autograd. Others may have what
    hooks on saved tensors have seen (`torch.autograd.graph.saved_tensors_hooks`).

    Args:
        x: what one variable of the caller's holds.
        others: references to it that the caller holds beside.
    """
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False
    objects, *memory = _references(x)
    alone, *own = _of_one_variable()
    return objects - others <= alone and memory == own


def _references(x: Tensor) -> tuple[int, int, int]:
    """To the Python object, to the tensor behind it, to its storage."""
    storage = x.untyped_storage()
    return sys.getrefcount(x), x._use_count(), torch._C._storage_Use_Count(storage._cdata)


@functools.cache
def _of_one_variable() -> tuple[int, int, int]:
    """What `is_last_reader` counts for a tensor that one variable holds: versions of Python differ
    in how many a call adds.
    """

    def counted(x: Tensor) -> tuple[int, int, int]:
        return _references(x)

    variable = torch.empty(1)
    return counted(variable)
