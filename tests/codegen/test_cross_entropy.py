"""The row kernel of linear + cross-entropy compiles with no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from iocompiler.codegen import kernels
from iocompiler.runtime.compile import Job, compile_kernels

_TEXT = (Path(kernels.__path__[0]) / "cross_entropy.py").read_text()
_CONSTANTS = {
    "CAPPED": True, "SMOOTHED": True, "GRADIENT": True, "SCALED": True, "SQUARED": True,
    "BLOCK": 4096,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_it_compiles_without_spills(capability: int, capped: bool, squared: bool) -> None:
    constants = _CONSTANTS | {"CAPPED": capped, "SQUARED": squared}
    pointers = [("logits", "*bf16"), ("target", "*i64")]
    pointers += [(name, "*fp32") for name in ("coefficient", "squared", "loss")]
    numbers = [(name, "i32") for name in ("vocabulary", "row_stride", "ignore_index")]
    floats = [(name, "fp32") for name in ("smoothing", "outer", "inner")]
    wrapper = (
        _TEXT
        + "\n\n@triton.jit\ndef rows("
        + ", ".join(name for name, _ in (*pointers, *numbers, *floats))
        + "):\n    cross_entropy_rows("
        + ", ".join(name for name, _ in (*pointers, *numbers, *floats))
        + "".join(f", {name}={value}" for name, value in constants.items())
        + ")\n"
    )
    job = Job(
        wrapper, "rows", (*pointers, *numbers, *floats), (0, 1, 2, 3, 4, 6), 16, 3, capability
    )
    built = compile_kernels([(job, "rows.py")])[0]
    assert built.cubin
    assert built.metadata["spills"] == 0
