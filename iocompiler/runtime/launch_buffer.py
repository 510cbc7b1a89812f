"""The buffers of launches: configuration and parameters as the driver reads them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# gridDim xyz, blockDim xyz, sharedMemBytes, pad, hStream, attrs, numAttrs, pad: CUlaunchConfig
_CONFIG = "IIIIIII4xQQI4x"
SCRATCH = ("global_scratch", "profile_scratch")  # two more pointers Triton's kernels take


@dataclass(frozen=True)
class Layout:
    """A launch buffer: ``packed`` at every call, the configuration, the parameters given then and
    the scratch pointers; ``fixed`` behind it, once. ``offsets`` are those of the kernel's
    parameters, in its order, in bytes.
    """

    packed: struct.Struct
    fixed: struct.Struct
    offsets: tuple[int, ...]

    def buffer(self, values: Sequence[float]) -> Any:
        made = ctypes.create_string_buffer(self.packed.size + self.fixed.size)
        self.fixed.pack_into(made, self.packed.size, *values)
        return made


class Slots:
    """Prepared launch buffers: (buffer, pointer to its configuration, to parameter addresses)."""

    def __init__(self, layout: Layout, values: Sequence[float]):
        self._layout, self._values = layout, values
        self.free: list[tuple[Any, ctypes.c_void_p, ctypes.c_void_p, Any]] = []

    def new(self) -> tuple[Any, ctypes.c_void_p, ctypes.c_void_p, Any]:
        buffer, offsets = self._layout.buffer(self._values), self._layout.offsets
        start = ctypes.addressof(buffer)
        addresses = (ctypes.c_void_p * len(offsets))(*(start + o for o in offsets))
        return (
            buffer,
            ctypes.c_void_p(start),
            ctypes.c_void_p(ctypes.addressof(addresses)),
            addresses,
        )


def layout_of(formats: Mapping[str, str], given: Sequence[str]) -> Layout:
    """The layout for parameters of these formats, in the kernel's order, of which some are given
    at every call, in their order. Both parts are aligned as in C: the first ends with pointers, so
    at a multiple of 8.
    """
    fixed = [name for name in formats if name not in given]
    packed, places = _struct("@" + _CONFIG, [*(formats[n] for n in given), *"QQ"])
    behind, further = _struct("@", [formats[n] for n in fixed])
    offsets = dict(zip([*given, *SCRATCH], places, strict=True))
    offsets |= {n: packed.size + o for n, o in zip(fixed, further, strict=True)}
    return Layout(packed, behind, tuple(offsets[n] for n in (*formats, *SCRATCH)))


def _struct(text: str, formats: Sequence[str]) -> tuple[struct.Struct, list[int]]:
    """The struct of ``text`` and fields of these formats, and the fields' offsets."""
    offsets = []
    for code in formats:
        text += code
        offsets.append(struct.calcsize(text) - struct.calcsize(code))
    return struct.Struct(text), offsets
