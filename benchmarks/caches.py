"""Cache folders of Inductor, Triton and ours: fresh ones, so that a first call is a first call, or
one that is kept, so that a peer that compiles for minutes does so once."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def variables(folder: Path) -> dict[str, str]:
    """The environment that puts every compiler's cache under ``folder``."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "IOCOMPILER_CACHE_DIR": str(folder / "iocompiler"),
    }


@contextlib.contextmanager
def fresh_caches() -> Iterator[Path]:
    """Empty caches inside; removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        with caches_in(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def caches_in(folder: Path) -> Iterator[None]:
    """Caches on disk under ``folder`` inside, and, where Inductor keeps one, an empty one in
    memory.
    """
    from torch._inductor.utils import clear_inductor_caches as clear_caches

    before = {name: os.environ.get(name) for name in variables(folder)}
    clear_caches()
    os.environ.update(variables(folder))
    try:
        yield
    finally:
        clear_caches()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
