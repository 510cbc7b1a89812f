"""Libraries that load when they are first called: they do so while the graph that calls them is
still being compiled.

cuDNN's attention takes about a second of the first call that a process makes of it, on an H100's
host. A small call, in a thread, has that behind it by the time the first real one comes.
"""

from __future__ import annotations

import contextlib
import threading

import torch
from torch import Tensor
from torch.fx import GraphModule

from iocompiler.graph import view
from iocompiler.ops.attention import FORWARD

_LENGTH = 64
_lock = threading.Lock()
_loading: threading.Thread | None = None


def load_ahead(graph: GraphModule) -> None:
    """Begin to load what the calls of ``graph``, on a GPU, will need; at most once in a process."""
    global _loading
    for node in view.calls(graph, FORWARD):
        query = view.value(node.args[0])  # type: ignore[arg-type]
        width = query.shape[3]
        if "cudnn" not in node.args or query.device.type != "cuda" or not isinstance(width, int):
            continue
        with _lock:
            if _loading is None:
                given = width, query.dtype, query.device
                # no daemon: a program that ends waits, rather than end in the middle of a library
                _loading = threading.Thread(target=_attend, args=given)
                _loading.start()
        return


def wait() -> None:
    """Until nothing is being loaded: a thread that allocates disturbs the recording of a graph."""
    if _loading is not None:
        _loading.join()


def _attend(width: int, dtype: torch.dtype, device: torch.device) -> None:
    with contextlib.suppress(Exception), torch.cuda.device(device), torch.no_grad():
        query: Tensor = torch.zeros(1, 1, _LENGTH, width, dtype=dtype, device=device)
        torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, query, query, None, False, 0.0, False, False
        )
