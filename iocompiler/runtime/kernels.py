"""The kernels of a generated module: their texts cut out of the file, and their cubins from the
cache or the workers.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from iocompiler.runtime.cache import Cache, default_cache
from iocompiler.runtime.compile import Compilable, Compiled, compile_kernels, warm
from iocompiler.runtime.launch import Image, Signature

_CELL = re.compile(r"^# %% (prelude|kernel|call) ?(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class KernelSpec:
    """A kernel of the module under one signature; ``launcher`` names the pair of the two.

    ``any_pointers``: name, warps and stages of the kernel that is launched in its place where a
    pointer has not the alignment hinted at; None where the same text is compiled for that.
    """

    name: str
    launcher: str
    signature: Signature
    num_warps: int
    num_stages: int
    where: str
    any_pointers: tuple[str, int, int] | None = None
    registers: int = 0

    @property
    def unhinted(self) -> KernelSpec:
        """What is compiled for pointers without alignment."""
        if self.any_pointers is None:
            return self
        name, warps, stages = self.any_pointers
        launcher = f"{name}({self.signature})"
        return replace(
            self,
            name=name,
            launcher=launcher,
            num_warps=warps,
            num_stages=stages,
            any_pointers=None,
        )

    def variants(self) -> tuple[tuple[bool, bool], ...]:
        """(pointers aligned, sizes divisible) of the versions made in advance: the first is the
        hinted one.
        """
        if self.signature.divisible(False, True):
            return ((True, True), (True, False))
        return ((True, False),)


def cells(source: str) -> tuple[str, dict[str, str], str]:
    """(prelude, kernel texts by name, call cell) of a module's text."""
    prelude, kernels, call = "", {}, ""
    marks = list(_CELL.finditer(source))
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        text = (
            source[mark.end() + 1 : following.start() if following else len(source)].strip("\n")
            + "\n"
        )
        if mark[1] == "prelude":
            prelude = text
        elif mark[1] == "kernel":
            # the comment above a kernel is where kernels equal to it in other models differ
            kernels[mark[2].strip()] = text[text.index("@triton.jit") :]
        else:
            call = text
    return prelude, kernels, call


def compiled_images(jobs: Mapping[str, Compilable], cache: Cache | None) -> dict[str, Image]:
    """The jobs' cubins by key: from the cache, or compiled together and stored there."""
    found: dict[str, Image] = {}
    for key in jobs:
        entry = cache.get("kernels", key) if cache else None
        if entry is not None:
            found[key] = Image(entry.files["kernel.cubin"], dict(entry.meta))
    missing = [key for key in jobs if key not in found]
    paths = {key: _source_path(cache, key) for key in missing}
    compiled = compile_kernels([(jobs[key], paths[key]) for key in missing], _scratch(cache))
    for key, result in zip(missing, compiled, strict=True):
        found[key] = Image(result.cubin, result.metadata)
        if cache is not None:
            _store(cache, key, jobs[key], result)
    return found


def warm_workers() -> None:
    """Start the compiler processes, unless they run, and return at once: for before a capture."""
    warm(_scratch(default_cache()))


def _source_path(cache: Cache | None, key: str) -> str:
    folder = (
        cache.folder("kernels", key) if cache else Path(tempfile.gettempdir(), "iocompiler", key)
    )
    return str(folder / "kernel.py")


def _scratch(cache: Cache | None) -> Path | None:
    if cache is None:
        return None
    folder = cache.root / "triton"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:  # a full disk, say: the cache itself tells that it cannot be written
        return None
    return folder


def _store(cache: Cache, key: str, job: Compilable, result: Compiled) -> None:
    files = {**job.files(), "kernel.cubin": result.cubin}
    cache.store("kernels", key, files, result.metadata)
