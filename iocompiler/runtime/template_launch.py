"""Launching a template. Triton's own way through its arguments takes longer than short kernels run;
here it is gone once for each form of the arguments.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from iocompiler.cost_model.attention_tiles import Tile
from iocompiler.runtime.worker import OPTIONS

_MOST = 4096
_TRIED = "3.6."  # the Triton whose compiled kernels take these arguments
_INT32 = 2**31 - 1
_Pick: TypeAlias = Callable[[Mapping[str, Any]], tuple[Any, ...]]
_known: dict[tuple[Any, ...], Any] = {}
_sorts: dict[tuple[Any, tuple[str, ...]], tuple[_Pick, _Pick, _Pick]] = {}


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
        compiled = kernel[(programs,)](**arguments, **OPTIONS)
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
    names = tuple(arguments)
    sorts = _sorts.get((kernel, names))
    if sorts is None:
        sorts = _sorts[kernel, names] = _sorted(kernel, arguments)
    tensors, sizes, others = (pick(arguments) for pick in sorts)
    given = (*tensors, *arguments.get("operands", ()))
    return (
        *("seen", kernel, device, names, others, tuple(size > _INT32 for size in sizes)),
        tuple([(x.dtype, x.data_ptr() % 16 == 0) for x in given]),
    )


def _sorted(kernel: Any, arguments: Mapping[str, Any]) -> tuple[_Pick, _Pick, _Pick]:
    """How to pick the tensors, the sizes Triton compiles nothing for, and the other arguments."""
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    sizes = [n for n in getattr(kernel, "do_not_specialize", None) or () if n in arguments]
    others = [n for n in arguments if n != "operands" and n not in (*tensors, *sizes)]
    return _picked(tensors), _picked(sizes), _picked(others)


def _picked(names: Sequence[str]) -> _Pick:
    if len(names) == 1:  # an itemgetter of one name gives no tuple
        return lambda arguments: (arguments[names[0]],)
    return operator.itemgetter(*names) if names else lambda arguments: ()


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
