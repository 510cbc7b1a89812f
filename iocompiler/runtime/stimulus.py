"""Random arguments for a kernel that is timed by itself: indices are kept in bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from iocompiler.runtime.values import size_value
from iocompiler.tile.program import Buffer, Op, TileProgram


class UnknownRange(Exception):
    """The program computes addresses from its inputs in a way that no random input is safe for."""


def has_safe_arguments(program: TileProgram, sizes: Mapping[str, int]) -> bool:
    """Whether `index_limits` knows what keeps the program in bounds."""
    try:
        index_limits(program, sizes)
    except UnknownRange:
        return False
    return True


def index_limits(program: TileProgram, sizes: Mapping[str, int]) -> dict[str, int]:
    """For each integer buffer that addresses are made of, the largest value that stays in bounds.

    Raises:
        UnknownRange: an address is made by more than picking an element of a buffer.
    """
    limits: dict[str, int] = {}
    for op in program.ops:
        if op.index is None or not op.index.values or not op.buffer:
            continue
        if len(op.index.values) > 1:
            raise UnknownRange("two indices in one address")
        room = (
            size_value(program.buffer(op.buffer).elements, sizes) - 1 - _reach(program, op, sizes)
        )
        (picked,) = op.index.values
        step = size_value(op.index.coefficient(f"%{picked}"), sizes)
        for name in _sources(program, picked):
            limits[name] = min(limits.get(name, 1 << 31), max(0, room // step) if step > 0 else 0)
    return limits


def _reach(program: TileProgram, op: Op, sizes: Mapping[str, int]) -> int:
    """The furthest element the axes alone lead to."""
    assert op.index is not None
    reach = size_value(op.index.const, sizes)
    for axis in program.axes:
        step = size_value(op.index.coefficient(axis.name), sizes)
        reach += max(0, step * (size_value(axis.size, sizes) - 1))
    return reach


def _sources(program: TileProgram, position: int) -> set[str]:
    """Buffers an index is loaded from, through casts, masks and the wrapping of negative ones."""
    op = program.ops[position]
    if op.kind == "const":
        return set()
    if op.kind == "load":
        return {op.buffer}
    if op.kind == "cast":
        return _sources(program, op.inputs[0])
    if op.kind == "map" and op.fn == "where":
        wraps = program.ops[op.inputs[0]].fn == "lt"
        branches = op.inputs[2:] if wraps else op.inputs[1:]
        return set().union(*(_sources(program, branch) for branch in branches))
    raise UnknownRange(f"an index made by {op.fn or op.kind}")


def tensor_for(
    buffer: Buffer, elements: int, limit: int | None, device: torch.device, seed: int
) -> torch.Tensor:
    """What lies behind a buffer's pointer: normal floats, integers of 0 and 1 (of 0 to ``limit``
    where they are indices), poison where it is only written.
    """
    if buffer.role == "out":
        return _poison(elements, buffer.dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    if buffer.dtype.is_floating_point:
        flat = torch.empty(elements, dtype=torch.float32, device=device)
        return flat.normal_(generator=generator).to(buffer.dtype)
    top = 2 if limit is None else limit + 1
    flat = torch.empty(elements, dtype=torch.int64, device=device)
    return flat.random_(0, top, generator=generator).to(buffer.dtype)


def _poison(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    flat = torch.empty(elements * dtype.itemsize, dtype=torch.uint8, device=device)
    # all bits set is NaN, -1 and, read as a bool, True
    return flat.fill_(1 if dtype == torch.bool else 255).view(dtype)


def number_for(buffer: Buffer) -> Any:
    """A by-value argument."""
    return 0.5 if buffer.dtype.is_floating_point else 1
