"""Tests in Triton's interpreter have a process of their own: it is chosen before the import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_in_tritons_interpreter() -> None:
    folder = Path(__file__).parent / "interpreted"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", str(folder)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
