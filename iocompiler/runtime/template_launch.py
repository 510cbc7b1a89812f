"""Launching a template. Triton's own way through its arguments takes longer than short kernels run;
here it is gone once for all calls that differ in their memory alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from iocompiler.cost_model.attention_tiles import Tile
from iocompiler.runtime.worker import OPTIONS

_MOST = 4096
_TRIED = "3.6."  # the Triton whose compiled kernels take these arguments
_INT32 = 2**31 - 1
_Given: TypeAlias = Tensor | tuple[Tensor, ...]
_known: dict[tuple[Any, ...], Any] = {}


class _Ready(NamedTuple):
    """A compiled kernel, its arguments with room for pointers, and where in them those go."""

    compiled: Any
    arguments: list[Any]
    slots: tuple[int, ...]


class Launch:
    """A template with all of its arguments but tensors.

    Args:
        kernel: a ``@triton.jit`` function; in Triton's interpreter it runs there.
        fixed: its other arguments, and the options of a launch (num_warps, num_stages).
    """

    def __init__(self, kernel: Any, **fixed: Any):
        self.kernel, self.fixed = kernel, fixed
        self._ready: dict[tuple[bool, ...], _Ready] = {}

    def run(self, programs: int, **tensors: _Given) -> None:
        """Run so many programs.

        Args:
            tensors: by the names of the template's arguments, in one order, with the dtypes and on
                the device of the first run.
        """
        if not programs:
            return
        device = next(iter(tensors.values())).device  # type: ignore[union-attr]
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run(programs, device, tensors)
        else:
            self._run(programs, device, tensors)

    def _run(self, programs: int, device: torch.device, tensors: Mapping[str, _Given]) -> None:
        pointers, aligned = _pointers(tensors)
        ready = self._ready.get(aligned)
        if ready is None:
            ready = self._find(aligned, device, tensors)
        if ready is None or not _direct():
            self._through_triton(programs, device, tensors)
            return
        compiled, arguments = ready.compiled, ready.arguments.copy()
        for slot, pointer in zip(ready.slots, pointers, strict=True):
            arguments[slot] = pointer
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        compiled.run(
            programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *arguments,
        )  # fmt: skip

    def _find(
        self, aligned: tuple[bool, ...], device: torch.device, tensors: Mapping[str, _Given]
    ) -> _Ready | None:
        """What another launch of this form has compiled."""
        compiled = _known.get(_form(self.kernel, {**self.fixed, **tensors}, device))
        if compiled is None:
            return None
        names = self.kernel.arg_names
        arguments = [None if name in tensors else self.fixed[name] for name in names]
        ready = _Ready(compiled, arguments, tuple(names.index(name) for name in tensors))
        self._ready[aligned] = ready
        return ready

    def _through_triton(
        self, programs: int, device: torch.device, tensors: Mapping[str, _Given]
    ) -> None:
        arguments = {**self.fixed, **tensors}
        compiled = self.kernel[(programs,)](**arguments, **OPTIONS)
        if hasattr(compiled, "packed_metadata"):  # the interpreter returns nothing
            if len(_known) >= _MOST:
                _known.clear()
            _known[_form(self.kernel, arguments, device)] = compiled


def tile_arguments(tile: Tile) -> dict[str, int]:
    """A tile as a template takes it."""
    limit = {"maxnreg": tile.registers} if tile.registers else {}
    return limit | {
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _pointers(tensors: Mapping[str, _Given]) -> tuple[list[Any], tuple[bool, ...]]:
    """Addresses, and for each whether it is a multiple of 16 bytes; () where all of them are."""
    pointers: list[Any] = []
    flat: list[int] = []
    for given in tensors.values():
        if isinstance(given, tuple):
            several = tuple([each.data_ptr() for each in given])
            pointers.append(several)
            flat += several
        else:
            pointer = given.data_ptr()
            pointers.append(pointer)
            flat.append(pointer)
    bits = 0
    for pointer in flat:
        bits |= pointer
    return pointers, tuple([pointer % 16 == 0 for pointer in flat]) if bits % 16 else ()


def _form(kernel: Any, arguments: Mapping[str, Any], device: torch.device) -> tuple[Any, ...]:
    """What Triton compiles a kernel for, and more: equal forms have the same cubin."""
    sizes = getattr(kernel, "do_not_specialize", None) or ()
    parts: list[Any] = [kernel, device]
    for name in sorted(arguments):
        value = arguments[name]
        if isinstance(value, Tensor):
            parts.append((value.dtype, value.data_ptr() % 16 == 0))
        elif name in sizes:
            parts.append(value > _INT32)
        elif isinstance(value, tuple):
            parts.append(tuple(_element(each) for each in value))  # strides, numbers, operands
        else:
            parts.append((name, value))  # options are there or not
    return tuple(parts)


def _element(value: Any) -> Any:
    """Triton looks at whether an integer is 1, and a multiple of 16, and at its width."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return value == 1, value % 16 == 0, -_INT32 <= value <= _INT32


def _direct() -> bool:
    """Whether a compiled kernel may be called without Triton: this one's is called as above, and
    nobody (a profiler) listens to launches.
    """
    tried, runtime = _triton()
    return tried and not (runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


@functools.cache
def _triton() -> tuple[bool, Any]:
    # not before a template runs: it imports Triton
    from triton import __version__, knobs

    return __version__.startswith(_TRIED), knobs.runtime
