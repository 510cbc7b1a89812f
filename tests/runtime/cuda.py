"""libcuda for tests without a GPU: it records what it is given."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

METADATA = {
    "name": "k",
    "num_warps": 4,
    "num_ctas": 1,
    "shared": 2048,
    "global_scratch_size": 0,
    "profile_scratch_size": 0,
    "cooperative": False,
    "waits": False,
}
_CONFIG = struct.Struct("@IIIIIII4xQQI4x")
_C_TYPES = {"Q": ctypes.c_uint64, "i": ctypes.c_int32, "q": ctypes.c_int64, "f": ctypes.c_float,
            "d": ctypes.c_double, "?": ctypes.c_bool}  # fmt: skip


class FakeLibrary:
    """libcuda's functions; `launches` holds (config, parameters) as the driver would read them."""

    def __init__(self, formats: str):
        self.formats = formats + "QQ"
        self.launches: list[tuple[tuple[int, ...], list[Any]]] = []
        self.attributes: list[tuple[int, int]] = []
        self.codes: list[int] = []
        self.entered = 0

    def cuLaunchKernelEx(self, config: Any, function: Any, parameters: Any, extra: Any) -> int:
        if self.codes:
            code = self.codes.pop(0)
            if code:
                return code
        addresses = (ctypes.c_void_p * len(self.formats)).from_address(parameters.value)
        values = [
            _C_TYPES[f].from_address(a or 0).value
            for f, a in zip(self.formats, addresses, strict=True)
        ]
        raw = ctypes.string_at(config.value, _CONFIG.size)
        self.launches.append((_CONFIG.unpack(raw), values))
        return 0

    def cuModuleLoadData(self, module: Any, cubin: bytes) -> int:
        module._obj.value = 1
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        function._obj.value = 2
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: Any) -> int:
        self.attributes.append((attribute, value.value))
        return 0

    def cuCtxGetCurrent(self, context: Any) -> int:
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.entered += 1
        return 0

    def cuDeviceGet(self, handle: Any, device: int) -> int:
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, handle: Any) -> int:
        context._obj.value = 3
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"some error"
        return 0
