"""A plan to a function: emit its file, compile its kernels, import it, bind them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from iocompiler.codegen.module import emit_module
from iocompiler.cost_model.device import Device
from iocompiler.plan.data import Plan
from iocompiler.runtime.ahead import compile_ahead
from iocompiler.runtime.cache import default_cache
from iocompiler.runtime.kernels import KernelSpec
from iocompiler.runtime.launch import Launch
from iocompiler.runtime.module import Module
from iocompiler.runtime.rehearsal import rehearse

Call = Callable[[list[Any]], list[Any]]


def load(
    plan: Plan,
    device: torch.device | None = None,
    name: str = "graph",
    hints: Mapping[str, int] | None = None,
) -> Call:
    """The function that runs ``plan``: it takes a list, which it empties, and returns a list.

    It has the attributes ``source`` (text of the file), ``path``, ``resources`` (kernel name to
    registers, spills, shared bytes) and ``module``. It runs on ``device``, or where that is None on
    the device of the plan; kernels are compiled for the GPU that is there. The templates that its
    calls launch are compiled in the background meanwhile, for ``hints`` of its size symbols.

    Raises:
        CompileError: a kernel does not compile.
        LaunchError: the driver refuses a kernel.
    """
    call: Any = begin(plan, device, name, hints)
    call.ready()
    result: Call = call
    return result


def begin(
    plan: Plan,
    device: torch.device | None = None,
    name: str = "graph",
    hints: Mapping[str, int] | None = None,
) -> Call:
    """As `load`, but the kernels, too, are still being compiled. The attribute ``ready`` is a
    function that waits for them, and raises as `load` does; without it, the first launch waits.
    """
    where = torch.device(device or plan.device)
    module = Module(module_file(emit_module(plan, name), name), str(where))
    on_gpu = where.type == "cuda"
    call = _call(module, (lambda: rehearse(plan, where, hints or {})) if on_gpu else None)
    if on_gpu:
        module.begin()
        with contextlib.suppress(Exception):  # what fails is told when it is launched
            compile_ahead(plan, where, hints or {})
    return call


def load_text(
    text: str, name: str, device: str = "", binder: Callable[[KernelSpec], Launch] | None = None
) -> Call:
    """As `load`, from the text of a module (of the graph cache, say); ``binder`` as in `Module`."""
    call: Any = _call(Module(module_file(text, name), device, binder))
    call.ready()
    result: Call = call
    return result


def _call(module: Module, meanwhile: Callable[[], None] | None = None) -> Call:
    """The function of the module's file, which is run; ``meanwhile`` is done before it is waited
    for kernels.
    """
    call: Any = _on_its_device(module.execute()["call"], module.device)

    def ready() -> None:
        if not module.bound:
            if meanwhile is not None:
                meanwhile()
            module.bind()
        call.resources = module.resources

    call.source, call.path, call.module, call.ready = module.source, module.path, module, ready
    call._boxed_call = True  # the way AOTAutograd knows that the list of arguments may be emptied
    result: Call = call
    return result


def prepare(plan: Plan, device: Device, name: str = "graph") -> Module:
    """Everything `load` does short of the GPU: the file is emitted and its kernels compiled for
    ``device``.

    The module returned has ``source``, ``path``, ``resources`` and the cubins (``images``).

    Raises:
        ValueError: ``device`` is not a GPU.
        CompileError: a kernel does not compile.
    """
    if device.capability is None:
        raise ValueError(f"{device.name} is not a GPU: there is nothing to compile for it")
    module = Module(module_file(emit_module(plan, name), name), plan.device, allocate=False)
    module.execute()
    major, minor = device.capability
    module.compile(10 * major + minor)
    return module


def module_file(text: str, name: str) -> str:
    """The path of a real file with this text, in the cache, or in a folder of this process's own
    without one.
    """
    key = f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    content = {f"{name}.py": text.encode()}
    cache = default_cache()
    if cache is not None:
        entry = cache.get("modules", key)
        folder = entry.folder if entry else cache.store("modules", key, content, {})
        if folder is not None:
            return str(folder / f"{name}.py")
    own = Path(_own_folder(), key)
    own.mkdir(exist_ok=True)
    (own / f"{name}.py").write_text(text)
    return str(own / f"{name}.py")


def imported(path: str | Path, name: str) -> ModuleType:
    """The module of a file: Triton reads the source of its functions there."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.lru_cache(maxsize=1)
def _own_folder() -> str:
    # kept in a global: the folder goes when the process ends
    global _temporary
    _temporary = tempfile.TemporaryDirectory(prefix="iocompiler-")
    return _temporary.name


_temporary: tempfile.TemporaryDirectory[str] | None = None


def _forget() -> None:
    """In a forked child: the folder is the parent's, and must not go when the child ends."""
    if _temporary is not None:
        _temporary._finalizer.detach()  # type: ignore[attr-defined]
    _own_folder.cache_clear()


os.register_at_fork(after_in_child=_forget)


def _on_its_device(call: Call, device: torch.device) -> Call:
    """``call`` with its GPU current. Where there is only one GPU, that is ``call`` itself."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return call
    index = torch.cuda.current_device() if device.index is None else device.index

    def guarded(args: list[Any]) -> list[Any]:
        with torch.cuda._DeviceGuard(index):
            return call(args)

    return guarded
