"""Whether a backward that runs now is the last to read what its forward saved, so that it may write
there.
"""

from __future__ import annotations

from typing import Any

import torch


def is_last_reader() -> bool:
    """True in a backward whose graph is not kept, where no hook of the user's has seen what was
    saved.

    A graph is kept under ``retain_graph=True`` and ``create_graph=True``; outside of autograd, where
    somebody calls a backward by hand or a generated file is run by itself, it counts as kept.
    Hooks on saved tensors (`torch.autograd.graph.saved_tensors_hooks`, `torch.utils.checkpoint`)
    may hand out what others hold too. Nor is it true while a CUDA graph is recorded, which replays
    without autograd.
    """
    if torch.cuda.is_current_stream_capturing():
        return False
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    node: Any = torch._C._current_autograd_node()
    saved = getattr(node, "_raw_saved_tensors", None)
    return saved is not None and all(getattr(each, "unpack_hook", _UNKNOWN) is None for each in saved)


_UNKNOWN = object()  # a version of torch that does not say
