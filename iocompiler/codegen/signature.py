"""The parameters of a kernel as text, which the generated module states and the runtime reads."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch

from iocompiler.tile.program import Buffer, TileProgram

_POINTER = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5", torch.bool: "i1",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.uint16: "u16", torch.uint32: "u32", torch.uint64: "u64",
}  # fmt: skip
# a half-precision number is passed as the float32 it is computed in
_SCALAR = {**_POINTER, torch.float16: "fp32", torch.bfloat16: "fp32"}


def signature(program: TileProgram, aligned: Container[str], extents: Container[str]) -> str:
    """The parameters of the kernel `codegen.triton.emit` writes, in order: "a_ptr:*fp32:16 n:i32".

    ``aligned`` are the buffers that start at a multiple of 16 bytes, ``extents`` the size symbols
    that are an extent of some tensor; any other number may need 64 bits.
    """
    return parameters(program.buffers, program.size_symbols, aligned, extents)


def parameters(
    buffers: Iterable[Buffer],
    symbols: Iterable[str],
    aligned: Container[str],
    extents: Container[str],
) -> str:
    """As `signature`, of a kernel that takes these buffers, then these sizes."""
    parts = []
    for buffer in buffers:
        if buffer.role == "scalar":
            parts.append(f"{buffer.name}:{_SCALAR[buffer.dtype]}")
        else:
            # one element is read alike wherever it lies: kernels are shared
            hint = ":16" if buffer.name in aligned and buffer.elements != 1 else ""
            parts.append(f"{buffer.name}_ptr:*{_POINTER[buffer.dtype]}{hint}")
    parts += [f"{s}:{'i32' if s in extents else 'i64'}:16" for s in symbols]
    return " ".join(parts)
