"""Launching a template. Triton's own way through its arguments takes longer than short kernels run;
here it is gone once for each form of the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    compiled = _compiled(kernel, arguments, device) if _direct() else None
    if compiled is None:
        compiled = kernel[(programs,)](**arguments)
        if hasattr(compiled, "packed_metadata"):  # the interpreter returns nothing
            _keep(_form(kernel, arguments, device, _kinds), compiled)
        return
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    given = [arguments[name] for name in kernel.arg_names]
    compiled.run(
        programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *given,
    )  # fmt: skip


def tile_arguments(tile: Tile) -> dict[str, int]:
    """A tile as a template takes it."""
    return {
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _compiled(kernel: Any, arguments: Mapping[str, Any], device: torch.device) -> Any:
    """What Triton compiled for arguments like these; None before it did. Strides and numbers are
    looked up as they are first: what they have in common takes longer to find.
    """
    exact = _form(kernel, arguments, device, _itself)
    found = _known.get(exact)
    if found is None:
        found = _known.get(_form(kernel, arguments, device, _kinds))
        if found is not None:
            _keep(exact, found)
    return found


def _keep(form: tuple[Any, ...], compiled: Any) -> None:
    if len(_known) >= _MOST:
        _known.clear()
    _known[form] = compiled


def _form(
    kernel: Any,
    arguments: Mapping[str, Any],
    device: torch.device,
    integers: Callable[[tuple[int, ...]], Any],
) -> tuple[Any, ...]:
    """What Triton compiles a kernel for, and more: equal forms have the same cubin."""
    sizes = getattr(kernel, "do_not_specialize", None) or ()
    parts: list[Any] = [kernel, device]
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            parts.append((value.dtype, value.data_ptr() % 16 == 0))
        elif name in sizes:
            parts.append(value > _INT32)
        elif not isinstance(value, tuple):
            parts.append(value)
        elif value and isinstance(value[0], Tensor):
            parts.append(tuple((each.dtype, each.data_ptr() % 16 == 0) for each in value))
        else:
            parts.append(integers(value))
    return tuple(parts)


def _itself(values: tuple[int, ...]) -> Any:
    return values


def _kinds(values: tuple[int, ...]) -> Any:
    """Triton looks at whether an integer is 1, and a multiple of 16, and at its width."""
    return tuple((v == 1, v % 16 == 0, -_INT32 <= v <= _INT32) for v in values), "kinds"


def _direct() -> bool:
    """Whether a compiled kernel may be called without Triton: this one's is called as above, and
    nobody (a profiler) listens to launches.
    """
    from triton import __version__, knobs

    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return __version__.startswith(_TRIED) and not any(hook.calls for hook in hooks)
