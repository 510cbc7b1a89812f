"""Importing `registered` alone, as an emitted file does, registers every operator of ours."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from iocompiler import ops

_NAMES = re.compile(r'library\.define\(\s*"(\w+)\(')


def test_every_operator_is_there() -> None:
    sources = Path(ops.__file__).parent.rglob("*.py")
    names = sorted({name for path in sources for name in _NAMES.findall(path.read_text())})
    assert {"biased_addmm", "addmm_gelu", "aligned_mm"} <= set(names)
    asked = "import torch, sys, iocompiler.ops.registered\n" + "".join(
        f"assert hasattr(torch.ops.iocompiler, {name!r}), {name!r}\n" for name in names
    )
    subprocess.run([sys.executable, "-c", asked], check=True)
