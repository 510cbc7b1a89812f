"""Launching a template. Triton's own way through its arguments takes longer than short kernels run;
here it is gone once for each form of the arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from iocompiler.cost_model.attention_tiles import Tile

_MOST = 4096
_TRIED = "3.6."  # the Triton whose compiled kernels take these arguments
_INT32 = 2**31 - 1
_known: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, programs: int, **arguments: Any) -> None:
    """Run so many programs of a template.

    Args:
        kernel: a ``@triton.jit`` function; in Triton's interpreter it runs there.
        arguments: all of its arguments, and the options of a launch (num_warps, num_stages).
    """
    if not programs:
        return
    device = next(each.device for each in arguments.values() if isinstance(each, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, programs, **arguments)
        return
    seen = _seen(kernel, arguments, device)
    compiled = _known.get(seen)
    if compiled is None:
        compiled = _known.get(_form(kernel, arguments, device))
        if compiled is not None:
            _remember(seen, compiled)
    if compiled is None or not _direct():
        compiled = kernel[(programs,)](**arguments)
        if hasattr(compiled, "packed_metadata"):  # the interpreter returns nothing
            _remember(_form(kernel, arguments, device), compiled)
        return
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    given = [arguments[name] for name in kernel.arg_names]
    compiled.run(
        programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *given,
    )  # fmt: skip


def tile_arguments(tile: Tile) -> dict[str, int]:
    """A tile as a template takes it."""
    limit = {"maxnreg": tile.registers} if tile.registers else {}
    return limit | {
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _remember(key: tuple[Any, ...], compiled: Any) -> None:
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = compiled


def _seen(kernel: Any, arguments: Mapping[str, Any], device: torch.device) -> tuple[Any, ...]:
    """The arguments as they are, soon said: equal ones have the same form."""
    sizes = getattr(kernel, "do_not_specialize", None) or ()
    parts: list[Any] = ["seen", kernel, device]
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            parts += (value.dtype, value.data_ptr() % 16 == 0)
        elif name == "operands":
            parts += ((x.dtype, x.data_ptr() % 16 == 0) for x in value)
        else:
            parts.append(value > _INT32 if name in sizes else value)
    return tuple(parts)


def _form(kernel: Any, arguments: Mapping[str, Any], device: torch.device) -> tuple[Any, ...]:
    """What Triton compiles a kernel for, and more: equal forms have the same cubin."""
    sizes = getattr(kernel, "do_not_specialize", None) or ()
    parts: list[Any] = [kernel, device]
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            parts.append((value.dtype, value.data_ptr() % 16 == 0))
        elif name in sizes:
            parts.append(value > _INT32)
        elif isinstance(value, tuple):
            parts.append(tuple(_element(each) for each in value))  # strides, numbers, operands
        else:
            parts.append(value)
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
    version, runtime = _triton()
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return version.startswith(_TRIED) and not any(hook.calls for hook in hooks)


@functools.cache
def _triton() -> tuple[str, Any]:
    # not before a template runs: it imports Triton
    from triton import __version__, knobs

    return __version__, knobs.runtime
