"""Launching a template: as generated kernels are compiled, cached, loaded and launched.

What all launches of a template but for their memory have in common is found once: a call looks at
where its tensors lie, and writes their addresses into a buffer in which all else stands.
"""

from __future__ import annotations

import functools
import operator
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
from iocompiler.runtime.recording import recorder
from iocompiler.runtime.template_form import ALIGNED, Form, form_of
from iocompiler.runtime.template_images import image
from iocompiler.runtime.worker import OPTIONS

_Given: TypeAlias = Tensor | tuple[Tensor, ...]
_Place: TypeAlias = "tuple[str | int, ...]"
Watcher: TypeAlias = "Callable[[Launch, Mapping[str, _Given]], None]"
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
_address = Tensor.data_ptr
_NONE = -1
"""No device."""
# absent in a torch built without CUDA
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: _NONE)


class Launch:
    """A template with all of its arguments but tensors.

    Args:
        kernel: a ``@triton.jit`` function; in Triton's interpreter it runs there.
        tensors: the names of its tensors, in the order they are given in at every run; those of an
            argument that is a tuple follow each other (`members`).
        fixed: its other arguments, and the options of a launch (num_warps, num_stages).
    """

    def __init__(self, kernel: Any, tensors: Sequence[str], **fixed: Any):
        from triton.runtime.jit import JITFunction  # the kernel's module has imported it

        self.kernel, self.tensors, self.fixed = kernel, tuple(tensors), fixed
        self._compiles = isinstance(kernel, JITFunction)
        self._device = _NONE  # that of the first run on a GPU
        self._bound: dict[tuple[bool, ...], launching.Launch] = {}
        self._failed: dict[tuple[bool, ...], IOCompilerError] = {}

    def run(self, programs: int, *tensors: Tensor) -> None:
        """Run so many programs.

        Args:
            tensors: with the dtypes and on the device of the first run.

        Raises:
            CompileError: the template does not compile.
            LaunchError: the driver refuses it.
        """
        if not programs:
            return
        watcher = _watcher.get()
        if watcher is not None:
            watcher(self, self.named(tensors))
        elif self._device == _NONE or self._device != _current_device():
            self._elsewhere(programs, tensors)
        else:
            self._run(programs, tensors)

    def form(self, tensors: Mapping[str, _Given], capability: int) -> Form:
        """What the cubin of a run with these tensors depends on."""
        return form_of(self.kernel, {**self.fixed, **tensors}, capability)

    def named(self, tensors: Sequence[Tensor]) -> dict[str, _Given]:
        """The tensors of a run by the names of the template's arguments."""
        found: dict[str, Any] = {}
        for name, tensor in zip(self.tensors, tensors, strict=True):
            argument, _, place = name.partition(".")
            found[argument] = (*found.get(argument, ()), tensor) if place else tensor
        return found

    def _elsewhere(self, programs: int, tensors: Sequence[Tensor]) -> None:
        """The first run, runs in Triton's interpreter, those on a device that is not current."""
        device = tensors[0].device
        if device.type != "cuda" or not self._compiles:
            told = recorder()
            if told is not None:
                told.unseen()
            self.kernel[(programs,)](**self.fixed, **self.named(tensors), **OPTIONS)
            return
        self._device = device.index
        with torch.cuda.device(device):
            self._run(programs, tensors)

    def _run(self, programs: int, tensors: Sequence[Tensor]) -> None:
        pointers, aligned = _pointers(tensors)
        bound = self._bound.get(aligned) or self._first(aligned, tensors)
        told = recorder()
        if told is not None:
            told.note(bound, (programs, 1, 1), tensors)
        bound(torch._C._cuda_getCurrentRawStream(self._device), programs, 1, 1, *pointers)

    def ready(self, *tensors: Tensor) -> None:
        """Have what `run` launches with tensors like these, or fail as that would.

        Raises:
            CompileError, LaunchError: as `run`.
        """
        device = tensors[0].device
        if _watcher.get() is not None or device.type != "cuda" or not self._compiles:
            return
        _, aligned = _pointers(tensors)
        if aligned not in self._bound:
            self._device = device.index
            with torch.cuda.device(device):
                self._first(aligned, tensors)

    def _first(self, aligned: tuple[bool, ...], tensors: Sequence[Tensor]) -> launching.Launch:
        """What does not compile is not tried again."""
        failed = self._failed.get(aligned)
        if failed is not None:
            raise failed
        try:
            bound = self._bound[aligned] = self._bind(tensors)
        except (CompileError, LaunchError) as error:
            self._failed[aligned] = error
            raise
        return bound

    def _bind(self, tensors: Sequence[Tensor]) -> launching.Launch:
        """The function that takes the pointers of tensors like these in their order."""
        form = self.form(self.named(tensors), _capability(self._device))
        found = _loaded(form, self.tensors, self._device)
        return found.bound([_at(self.fixed, place) for place in found.fixed])


def members(argument: str, count: int) -> list[str]:
    """The names of so many tensors in an argument that is a tuple."""
    return [_name((argument, place)) for place in range(count)]


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
    return {"BLOCK_M": tile.m, "BLOCK_N": tile.n, **launch_options(tile)}


def launch_options(tile: Tile) -> dict[str, int]:
    """Of a tile all but its sizes."""
    limit = {"maxnreg": tile.registers} if tile.registers else {}
    return limit | {"num_warps": tile.warps, "num_stages": tile.stages}


def _pointers(tensors: Sequence[Tensor]) -> tuple[list[int], tuple[bool, ...]]:
    """Addresses, and for each whether it is a multiple of 16 bytes; () where all of them are."""
    pointers = list(map(_address, tensors))
    if not functools.reduce(operator.or_, pointers) % ALIGNED:
        return pointers, ()
    return pointers, tuple([pointer % ALIGNED == 0 for pointer in pointers])


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
