"""The few calls of the CUDA driver a launcher needs, by ctypes: Triton is not needed to run."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

from iocompiler.errors import LaunchError

INVALID_CONTEXT = 201
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_SHARED_LIMIT = 48 * 1024


class Driver:
    """libcuda, its contexts and the modules loaded into them."""

    def __init__(self, library: Any):
        self._library = library
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._functions: dict[tuple[bytes, str, int], int] = {}
        self._lock = threading.Lock()
        # no argtypes: a launch passes ctypes objects made beforehand, which is the cheapest call
        self.launch: Callable[..., int] = library.cuLaunchKernelEx

    def function(self, cubin: bytes, name: str, shared: int, device: int) -> int:
        """The handle of kernel ``name`` on ``device``; a cubin is loaded once per device.

        Raises:
            LaunchError: the driver refuses the cubin, or the device has less shared memory.
        """
        key = (cubin, name, device)  # the hash of bytes is found once
        with self._lock:
            if key not in self._functions:
                self._functions[key] = self._load(cubin, name, shared, device)
            return self._functions[key]

    def _load(self, cubin: bytes, name: str, shared: int, device: int) -> int:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        previous = self.enter(device)
        try:
            self._check(
                self._library.cuModuleLoadData(ctypes.byref(module), cubin), name, "loading"
            )
            found = self._library.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
            self._check(found, name, "finding the kernel in its cubin")
            if shared > _STATIC_SHARED_LIMIT:
                code = self._library.cuFuncSetAttribute(
                    function, _MAX_DYNAMIC_SHARED, ctypes.c_int(shared)
                )
                self._check(code, name, f"reserving {shared} bytes of shared memory")
        finally:
            self._library.cuCtxSetCurrent(previous)
        assert function.value is not None
        return function.value

    def enter(self, device: int) -> ctypes.c_void_p:
        """Make the device's primary context (torch's too) this thread's; returns the one before."""
        previous = ctypes.c_void_p()
        self._library.cuCtxGetCurrent(ctypes.byref(previous))
        if device not in self._contexts:
            handle, context = ctypes.c_int(), ctypes.c_void_p()
            self._check(
                self._library.cuDeviceGet(ctypes.byref(handle), device), f"cuda:{device}", "opening"
            )
            code = self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
            self._check(code, f"cuda:{device}", "opening")
            self._contexts[device] = context
        self._check(
            self._library.cuCtxSetCurrent(self._contexts[device]), f"cuda:{device}", "entering"
        )
        return previous

    def _check(self, code: int, kernel: str, action: str) -> None:
        if code:
            raise LaunchError(kernel=kernel, action=action, cause=self.describe(code))

    def describe(self, code: int) -> str:
        """The driver's text for an error code."""
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        return f"{text.value.decode() if text.value else 'unknown error'} (CUDA error {code})"


@functools.lru_cache(maxsize=1)
def driver() -> Driver:
    """The driver of this process.

    Raises:
        OSError: there is no NVIDIA driver on this machine.
    """
    library = ctypes.CDLL("libcuda.so.1")
    code = library.cuInit(0)
    found = Driver(library)
    if code:
        raise LaunchError(kernel="cuInit", action="starting CUDA", cause=found.describe(code))
    return found
