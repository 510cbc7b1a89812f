"""Every test of the runtime has a disk cache of its own, and worker processes that end with the
tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from iocompiler.runtime import compile as compiling


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("IOCOMPILER_CACHE_DIR", str(root))
    return root


@pytest.fixture(autouse=True, scope="module")
def _workers() -> Iterator[None]:
    yield
    compiling.shut_down()
