"""What of the compiler works on this machine, what is missing, and what to install for it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from iocompiler.versions import OLDEST, version_tuple

OLDEST_PYTHON = (3, 10)

State = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``needed``: without it the compiler does not work here at all."""

    name: str
    state: State
    found: str
    advice: str = ""
    needed: bool = False


def examine() -> tuple[Check, ...]:
    """Every check, in the order in which they matter. Nothing is installed or changed."""
    return tuple(_checks())


def exit_code(checks: tuple[Check, ...]) -> int:
    """1 where something needed is missing or broken, else 0."""
    return int(any(c.needed and c.state != "ok" for c in checks))


def _checks() -> Iterator[Check]:
    yield _python()
    yield _package("torch", needed=True, advice="pip install 'torch>=2.11'")
    yield _package(
        "triton", needed=False, advice="pip install 'triton>=3.6' (Linux); GPU kernels need it"
    )
    yield _gpu()
    yield _kernel_compiler()
    yield _cpp_compiler()
    yield _cache()
    yield _optional("transformers", "pip install 'iocompiler[examples]': the examples need it")
    yield _optional("torch_mlir", "pip install 'iocompiler[mlir]': saving .mlir needs it")


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= OLDEST_PYTHON:
        return Check("Python", "ok", found, needed=True)
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return Check("Python", "broken", found, f"install Python {oldest} or newer", needed=True)


def _package(name: str, needed: bool, advice: str) -> Check:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "missing", "not installed", advice, needed)
    if version_tuple(found) < OLDEST[name]:
        return Check(name, "broken", f"{found} is too old", advice, needed)
    return Check(name, "ok", found, needed=needed)


def _optional(module: str, advice: str) -> Check:
    name = module.replace("_", "-")
    if importlib.util.find_spec(module) is None:
        return Check(name, "missing", "not installed", advice)
    return Check(name, "ok", "installed")


def _gpu() -> Check:
    import torch

    from iocompiler.cost_model.device import current_device

    if not torch.cuda.is_available():
        built = torch.version.cuda or "none"
        advice = "explain works without one; a CPU graph runs through Inductor's C++"
        return Check("GPU", "missing", f"none (torch built for CUDA {built})", advice)
    row = current_device(torch.device("cuda", torch.cuda.current_device()))
    return Check("GPU", "ok", f"{torch.cuda.get_device_name()}, priced as {row.name}")


def _kernel_compiler() -> Check:
    """Whether Triton makes a cubin here: it needs its own ptxas, not a GPU."""
    from iocompiler.runtime.compile import Job, compile_kernels

    source = (
        "import triton\nimport triton.language as tl\n\n@triton.jit\n"
        "def double(x, n):\n    i = tl.arange(0, 128)\n"
        "    tl.store(x + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)\n"
    )
    job = Job(
        source=source,
        name="double",
        signature=(("x", "*fp32"), ("n", "i32")),
        divisible=(0,),
        num_warps=4,
        num_stages=2,
        capability=90,
    )
    try:
        (compiled,) = compile_kernels([(job, "double.py")])
    except Exception as error:  # whatever is broken in an installation is what is asked for
        cause = (str(error) or type(error).__name__).strip().splitlines()[0]
        return Check(
            "kernel compiler",
            "broken",
            cause,
            "reinstall triton: pip install --force-reinstall triton",
        )
    registers = compiled.metadata["registers"]
    return Check("kernel compiler", "ok", f"sm_90 cubin, {registers} registers")


def _cpp_compiler() -> Check:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        found = get_cpp_compiler()
    except Exception as error:  # Inductor raises classes of its own, which differ between versions
        cause = (str(error) or type(error).__name__).strip().splitlines()[0]
        advice = "install g++ (apt-get install g++); without it CPU graphs run on aten"
        return Check("C++ compiler", "missing", cause, advice)
    return Check("C++ compiler", "ok", str(found))


def _cache() -> Check:
    from iocompiler.runtime import cache

    found = cache.info()
    if found is None:
        return Check(
            "cache", "broken", "cannot be used", "set IOCOMPILER_CACHE_DIR to a folder of your own"
        )
    count = sum(found.entries.values())
    return Check("cache", "ok", f"{found.root}: {count} entries, {found.bytes / 1e6:.1f} MB")
