"""Launching a template: as generated kernels are compiled, cached, loaded and launched.

What all launches of a template but for their memory have in common is found once: a call looks at
where its tensors lie, and writes their addresses into a buffer in which all else stands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from iocompiler.cost_model.attention_tiles import Tile
from iocompiler.errors import CompileError, IOCompilerError, LaunchError
from iocompiler.runtime import launch as launching
from iocompiler.runtime.driver import driver
from iocompiler.runtime.launch import Parameter, Signature, loaded
from iocompiler.runtime.template_form import ALIGNED, Form, form_of
from iocompiler.runtime.template_images import image
from iocompiler.runtime.worker import OPTIONS

_Given: TypeAlias = Tensor | tuple[Tensor, ...]
_Place: TypeAlias = "tuple[str | int, ...]"
Watcher: TypeAlias = "Callable[[Launch, Mapping[str, _Given]], None]"
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


class Launch:
    """A template with all of its arguments but tensors.

    Args:
        kernel: a ``@triton.jit`` function; in Triton's interpreter it runs there.
        fixed: its other arguments, and the options of a launch (num_warps, num_stages).
    """

    def __init__(self, kernel: Any, **fixed: Any):
        from triton.runtime.jit import JITFunction  # the kernel's module has imported it

        self.kernel, self.fixed = kernel, fixed
        self._compiles = isinstance(kernel, JITFunction)
        self._bound: dict[tuple[bool, ...], launching.Launch] = {}
        self._failed: dict[tuple[bool, ...], IOCompilerError] = {}

    def run(self, programs: int, **tensors: _Given) -> None:
        """Run so many programs.

        Args:
            tensors: by the names of the template's arguments, in one order, with the dtypes and on
                the device of the first run.

        Raises:
            CompileError: the template does not compile.
            LaunchError: the driver refuses it.
        """
        if not programs:
            return
        watcher = _watcher.get()
        if watcher is not None:
            watcher(self, tensors)
            return
        device = next(iter(tensors.values())).device  # type: ignore[union-attr]
        if device.type != "cuda" or not self._compiles:
            self.kernel[(programs,)](**self.fixed, **tensors, **OPTIONS)
        elif device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run(programs, device.index, tensors)
        else:
            self._run(programs, device.index, tensors)

    def form(self, tensors: Mapping[str, _Given], capability: int) -> Form:
        """What the cubin of a run with these tensors depends on."""
        return form_of(self.kernel, {**self.fixed, **tensors}, capability)

    def _run(self, programs: int, device: int, tensors: Mapping[str, _Given]) -> None:
        pointers, aligned = _pointers(tensors)
        bound = self._bound.get(aligned) or self._first(aligned, device, tensors)
        bound(torch._C._cuda_getCurrentRawStream(device), programs, 1, 1, *pointers)

    def ready(self, **tensors: _Given) -> None:
        """Have what `run` launches with tensors like these, or fail as that would.

        Raises:
            CompileError, LaunchError: as `run`.
        """
        device = next(iter(tensors.values())).device  # type: ignore[union-attr]
        if _watcher.get() is not None or device.type != "cuda" or not self._compiles:
            return
        _, aligned = _pointers(tensors)
        if aligned not in self._bound:
            with torch.cuda.device(device):
                self._first(aligned, device.index, tensors)

    def _first(
        self, aligned: tuple[bool, ...], device: int, tensors: Mapping[str, _Given]
    ) -> launching.Launch:
        """What does not compile is not tried again."""
        failed = self._failed.get(aligned)
        if failed is not None:
            raise failed
        try:
            bound = self._bound[aligned] = self._bind(device, tensors)
        except (CompileError, LaunchError) as error:
            self._failed[aligned] = error
            raise
        return bound

    def _bind(self, device: int, tensors: Mapping[str, _Given]) -> launching.Launch:
        """The function that takes the pointers of tensors like these in their order."""
        form, given = self.form(tensors, _capability(device)), _names(tensors)
        found = _loaded(form, tuple(given), device)
        return found.bound([_at(self.fixed, place) for place in found.fixed])


class _Loaded(NamedTuple):
    """A template on a device: what makes launch functions, and where in its arguments the values
    lie that this takes.
    """

    bound: Callable[[Sequence[float]], launching.Launch]
    fixed: tuple[_Place, ...]


@functools.lru_cache(maxsize=4096)
def _loaded(form: Form, given: tuple[str, ...], device: int) -> _Loaded:
    found = image(form)
    names = [name for name, _ in form.arguments]
    places = [(names[place[0]], *place[1:]) for place, _ in found.metadata["parameters"]]
    kinds = [kind for _, kind in found.metadata["parameters"]]
    rows = [Parameter(_name(place), kind, False) for place, kind in zip(places, kinds, strict=True)]
    made = loaded(Signature(tuple(rows)), found, driver(), device, given)
    return _Loaded(made, tuple(place for place in places if _name(place) not in given))


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """In here, and in this thread, no template runs: ``watcher(launch, tensors)`` is called."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def tile_arguments(tile: Tile) -> dict[str, int]:
    """A tile as a template takes it."""
    limit = {"maxnreg": tile.registers} if tile.registers else {}
    return limit | {
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _pointers(tensors: Mapping[str, _Given]) -> tuple[list[int], tuple[bool, ...]]:
    """Addresses, and for each whether it is a multiple of 16 bytes; () where all of them are."""
    pointers: list[int] = []
    for given in tensors.values():
        if isinstance(given, tuple):
            pointers += [each.data_ptr() for each in given]
        else:
            pointers.append(given.data_ptr())
    bits = 0
    for pointer in pointers:
        bits |= pointer
    return pointers, tuple([p % ALIGNED == 0 for p in pointers]) if bits % ALIGNED else ()


def _names(tensors: Mapping[str, _Given]) -> list[str]:
    """The tensors' names in the order of `_pointers`."""
    names: list[str] = []
    for name, given in tensors.items():
        several = isinstance(given, tuple)
        names += [_name((name, place)) for place in range(len(given))] if several else [name]
    return names


def _name(place: _Place) -> str:
    """Of an argument, or of what lies in one: "strides.0"."""
    return ".".join(map(str, place))


def _at(arguments: Mapping[str, Any], place: _Place) -> Any:
    found: Any = arguments
    for part in place:
        found = found[part]
    return found


@functools.lru_cache(maxsize=64)
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
