"""No garbage collection while compiling.

A compilation makes graphs: a great many small objects that live on. Python's collector walks them
all again and again as they grow, and finds next to nothing: a tenth of a first call.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside = 0
_enabled = False


@contextmanager
def uncollected() -> Iterator[None]:
    """In here, and wherever else in the process, the collector rests; it goes on with the last of
    the threads that leave, where it ran with the first that entered.
    """
    global _inside, _enabled
    with _lock:
        if _inside == 0:
            _enabled = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _enabled:
                gc.enable()
