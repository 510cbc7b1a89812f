"""One emitted kernel to a cubin in this process, with no GPU: its resources, if it compiles."""

from __future__ import annotations

import contextlib
import io
import linecache
import re
from dataclasses import dataclass
from typing import Any

import torch

from iocompiler.codegen.triton import PRELUDE
from iocompiler.plan.data import Schedule
from iocompiler.tile.program import Buffer, TileProgram

_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.bool: "i1",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.uint64: "u64",
}
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Built:
    """A cubin; ``registers`` of a thread, ``spills`` in bytes, ``shared`` bytes of a block."""

    cubin: bytes
    ptx: str
    registers: int
    spills: int
    shared: int


def signature(program: TileProgram) -> dict[str, str]:
    """Triton's type of each parameter of the kernel `codegen.triton.emit` writes, in order."""
    types = dict(_parameter(b) for b in program.buffers)
    return types | dict.fromkeys(program.size_symbols, "i32")


def _parameter(buffer: Buffer) -> tuple[str, str]:
    if buffer.role != "scalar":
        return f"{buffer.name}_ptr", f"*{_TYPES[buffer.dtype]}"
    # a half-precision number is passed as the float32 it is computed in
    half = buffer.dtype in (torch.float16, torch.bfloat16)
    return buffer.name, "fp32" if half else _TYPES[buffer.dtype]


def divisible(program: TileProgram, aligned: frozenset[str]) -> tuple[int, ...]:
    """Positions of the pointers known to be 16-byte aligned: the buffers in ``aligned``."""
    return tuple(
        i for i, b in enumerate(program.buffers) if b.role != "scalar" and b.name in aligned
    )


def compile_source(
    source: str,
    name: str,
    program: TileProgram,
    schedule: Schedule,
    capability: tuple[int, int] = (9, 0),
    aligned: frozenset[str] | None = None,
) -> Built:
    """Compile the kernel ``name`` of ``source``, which has no prelude, for a compute capability.

    Args:
        aligned: names of the buffers that start at a multiple of 16 bytes; by default all, as
            torch allocates them.

    Raises:
        triton.CompilationError: the text is no valid kernel.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if aligned is None:
        aligned = frozenset(b.name for b in program.buffers)
    attrs = {(i,): [["tt.divisibility", 16]] for i in divisible(program, aligned)}
    function = _function(f"{PRELUDE}\n\n{source}", name)
    log = io.StringIO()
    # ptxas prints registers and spills nowhere else, and nothing for a cached kernel
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        compiled = triton.compile(
            ASTSource(function, signature(program), attrs=attrs),
            target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
            options={"num_warps": schedule.num_warps, "num_stages": schedule.num_stages},
        )
    return _built(compiled, log.getvalue())


def _built(compiled: Any, log: str) -> Built:
    registers, spills = _REGISTERS.search(log), _SPILLS.search(log)
    return Built(
        cubin=compiled.asm["cubin"],
        ptx=compiled.asm["ptx"],
        registers=int(registers[1]) if registers else -1,
        spills=int(spills[1]) + int(spills[2]) if spills else -1,
        shared=compiled.metadata.shared,
    )


def _function(text: str, name: str) -> Any:
    """The jitted function; Triton reads its text back by lines of a file that need not exist."""
    path = f"<kernel {name} {hash(text):x}>"
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    namespace: dict[str, Any] = {"__name__": "kernel", "__file__": path}
    exec(compile(text, path, "exec"), namespace)
    return namespace[name]
