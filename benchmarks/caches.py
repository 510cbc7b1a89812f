"""Fresh cache folders, so that a first call is a first call: Inductor's, Triton's and ours."""

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
    """Empty caches inside, on disk and, where Inductor keeps one, in memory; removed afterwards."""
    from torch._inductor.utils import clear_inductor_caches as clear_caches

    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    before = {name: os.environ.get(name) for name in variables(folder)}
    clear_caches()
    os.environ.update(variables(folder))
    try:
        yield folder
    finally:
        clear_caches()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)
