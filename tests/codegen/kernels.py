"""Running the emitted Triton text of a tile program: by the interpreter, or compiled on a GPU."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from iocompiler.codegen.batch import emit_batch
from iocompiler.codegen.triton import PRELUDE, emit, grid
from iocompiler.plan.data import Schedule
from iocompiler.runtime.load import imported
from iocompiler.tile.program import TileProgram

_count = itertools.count()
_folder = tempfile.TemporaryDirectory(prefix="iocompiler-tests-")


def kernel_of(program: TileProgram, schedule: Schedule) -> Any:
    """The ``@triton.jit`` function of a program, from a real file: Triton reads its source."""
    return _loaded(lambda name: emit(program, schedule, name))


def batch_kernel_of(program: TileProgram, schedule: Schedule) -> Any:
    """The ``@triton.jit`` function of a program over many sets of tensors."""
    return _loaded(lambda name: emit_batch(program, schedule, name))


def _loaded(write: Callable[[str], str]) -> Any:
    name = f"kernel_{next(_count)}"
    path = Path(_folder.name) / f"{name}.py"
    path.write_text(PRELUDE + "\n\n" + write(name))
    return getattr(imported(path, name), name)


def run_kernel(
    program: TileProgram,
    buffers: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    schedule: Schedule,
) -> None:
    """As `tile.interpret.run`, through the emitted Triton text."""
    blocks = tuple(
        b if isinstance(b, int) else int(b.subs({s: sizes[s.name] for s in b.free_symbols}))
        for b in grid(program, schedule)
    )
    if 0 in blocks:
        return
    args = [
        buffers[b.name].item() if b.role == "scalar" else buffers[b.name] for b in program.buffers
    ]
    kernel_of(program, schedule)[blocks](
        *args, *(sizes[s] for s in program.size_symbols), num_warps=schedule.num_warps
    )
