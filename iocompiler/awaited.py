"""Functions whose kernels are still being compiled when they are handed out.

Compilers work in other processes: meanwhile this one plans the backward, and Dynamo writes its
guards. Who calls first waits for what is left.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from iocompiler.runtime.tangents import Boxed


def ready(run: Boxed) -> Boxed:
    """``run``, once its kernels are compiled and on the device.

    Raises:
        CompileError, LaunchError: one cannot be.
    """
    wait = getattr(run, "ready", None)
    if wait is not None:
        wait()
    return run


def awaited(run: Boxed, settled: Callable[[], Boxed]) -> Boxed:
    """A function with the attributes of ``run`` that at its first call asks ``settled``, once, what
    it is from then on; threads that call meanwhile wait.
    """
    chosen: Boxed | None = None
    lock = os.getpid(), threading.Lock()

    def choose() -> Boxed:
        nonlocal chosen, settled, lock
        if lock[0] != os.getpid():  # a thread that a forked child has not may hold it
            lock = os.getpid(), threading.Lock()
        with lock[1]:
            if chosen is None:
                chosen = settled()
                del settled  # and with it the graph
        return chosen

    def call(args: list[Any]) -> Any:
        return (chosen or choose())(args)

    vars(call).update(vars(run))
    return call
