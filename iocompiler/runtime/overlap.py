"""Kernels whose programs are placed on the device while the last ones of the kernel before still
run (programmatic dependent launch, from Hopper on).

A kernel that is launched so begins by waiting until the kernel before it is done and its writes can
be read, and then lets the next one be placed. What is between two kernels (0.6 to 1 us: the launch,
the start of the first programs) goes on beside the end of the first. A kernel that does not wait
must not be launched so; one that waits may follow, and be followed by, any other.

Imports the standard library only: a worker compiles by it.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CAPABILITY = 90
"""The first whose kernels can wait (90 is version 9.0)."""
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
# CUlaunchAttribute: its number, eight bytes in, a union of 64 bytes
_ATTRIBUTE = ctypes.create_string_buffer(struct.pack("@I4xi60x", _PROGRAMMATIC_SERIALIZATION, 1))
ATTRIBUTES = ctypes.addressof(_ATTRIBUTE), 1
"""Address and number of a launch's attributes, as `CUlaunchConfig` has them."""
NO_ATTRIBUTES = 0, 0

# the first instruction of a kernel, behind its registers' declarations
_FIRST = re.compile(r"\.entry\b.*?// %bb\.0:[^\n]*\n", re.DOTALL)
_BEGIN = "\tgriddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;\n"


def waiting(ptx: str) -> str | None:
    """A kernel's PTX with the wait before all that it does; None where its beginning is not
    found.
    """
    first = _FIRST.search(ptx)
    return ptx[: first.end()] + _BEGIN + ptx[first.end() :] if first else None


@contextmanager
def waiting_kernels(knobs: Any, capability: int) -> Iterator[list[bool]]:
    """In here Triton compiles kernels that wait; the list has for each whether it does.

    Args:
        knobs: Triton's.
    """
    found: list[bool] = []

    def hook(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str]:
        # without arguments it is asked for a key of Triton's cache, in which nothing is looked up
        if stages is not None:
            stages["ptx"] = _with_wait(stages["ptx"], found)
        return "", ""

    if capability < CAPABILITY:
        yield found
        return
    knobs.runtime.add_stages_inspection_hook = hook
    try:
        yield found
    finally:
        knobs.runtime.add_stages_inspection_hook = None


def _with_wait(stage: Callable[..., str], found: list[bool]) -> Callable[..., str]:
    def made(source: Any, metadata: Any) -> str:
        ptx = stage(source, metadata)
        changed = waiting(ptx)
        found.append(changed is not None)
        return ptx if changed is None else changed

    return made
