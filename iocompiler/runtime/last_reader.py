"""Whether a backward that runs now is the last to read what its forward saved, so that it may write
there.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

_USES: Any = torch.Tensor._use_count  # type: ignore[attr-defined]


def is_last_reader(x: Tensor) -> bool:
    """True in a backward whose graph is not kept, where nobody else has the tensor or its memory.

    A graph is kept under ``retain_graph=True`` and ``create_graph=True``. It counts as kept outside
    of autograd, where somebody calls a backward by hand or runs a generated file, and while a CUDA
    graph is recorded, which replays without autograd. Others may have what hooks on saved tensors
    have seen (`torch.autograd.graph.saved_tensors_hooks`).

    Args:
        x: what one variable of the caller's holds.
    """
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    if _is_recorded():
        return False
    objects, *memory = _references(x)
    alone, *own = _of_one_variable()
    return objects <= alone and memory == own


def _is_recorded() -> bool:
    cuda: Any = torch.cuda
    return bool(cuda.is_initialized() and cuda.is_current_stream_capturing())


def _references(x: Tensor) -> tuple[int, int, int]:
    """To the Python object, to the tensor behind it, to its storage."""
    storage, tensor = x.untyped_storage(), _USES(x)
    return sys.getrefcount(x), tensor, torch._C._storage_Use_Count(storage._cdata)


@functools.cache
def _of_one_variable() -> tuple[int, int, int]:
    """What `is_last_reader` counts for a tensor that one variable holds: versions of Python differ
    in how many a call adds.
    """

    def counted(x: Tensor) -> tuple[int, int, int]:
        return _references(x)

    variable = torch.empty(1)
    return counted(variable)
