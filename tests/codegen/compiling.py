"""Kernels of tile programs compiled with no GPU, by the workers that compile a plan's."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Collection

from triton import knobs

from iocompiler.codegen.signature import signature
from iocompiler.plan.data import KernelStep, Schedule
from iocompiler.runtime.compile import Compiled, compile_kernels
from iocompiler.runtime.subject import Subject
from iocompiler.tile.program import TileProgram


def compiled(
    program: TileProgram,
    schedule: Schedule,
    capability: int = 90,
    aligned: Collection[str] | None = None,
) -> Compiled:
    """The cubin; ``aligned`` are the buffers at multiples of 16 bytes, by default all."""
    names = tuple(b.name for b in program.buffers)
    symbols = program.size_symbols
    text = signature(program, names if aligned is None else aligned, symbols)
    step = KernelStep("kernel", program, schedule, names, ())
    job = Subject(step, "kernel", text, dict.fromkeys(symbols, 1)).job(schedule, capability)
    return compile_kernels([(job, "kernel.py")])[0]


def instructions(kernel: Compiled) -> str:
    """The cubin disassembled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
