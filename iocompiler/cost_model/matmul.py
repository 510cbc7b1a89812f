"""What a step of the matmul template costs, and whether it is expected to be faster than the calls
and the kernel it replaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from iocompiler.cost_model.cost import Contraction, Cost
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.roofline import time
from iocompiler.plan.product import Product
from iocompiler.tile.program import TileProgram
from iocompiler.tile.traffic import Traffic, traffic


def matmul_cost(made: Product, program: TileProgram) -> Cost:
    """Operands once, what the epilogue reads and writes once, the arithmetic of both."""
    rights = len(made.rights)
    moved = epilogue_traffic(made, program)
    operands = sum(made.elements_read, 0) * made.dtype.itemsize
    inner = Contraction(made.batch, made.m, made.n, made.k, made.dtype, is_aligned(made))
    return Cost(
        moved.read_bytes + operands,
        moved.written_bytes,
        moved.flops + inner.flops * rights,
        moved.transcendentals,
        (inner,) * rights,
    )


def epilogue_traffic(made: Product, program: TileProgram) -> Traffic:
    """What the epilogue moves to and from memory: the sums are in registers."""
    sums = {buffer.name for buffer in program.buffers[: len(made.rights)]}
    stored = tuple(buffer for buffer in program.buffers if buffer.name not in sums)
    return traffic(replace(program, buffers=stored))


def is_aligned(made: Product) -> bool:
    """Whether rows of every operand start on boundaries that its loads need to be whole."""
    if not made.aligned:
        return False
    for row, column, batch in (made.left, *made.rights):
        leading = row if column == 1 else column if row == 1 else None
        if leading is None or not (made.is_whole(leading) and made.is_whole(batch)):
            return False
    return True


def matmul_seconds(
    made: Product, program: TileProgram, device: Device, hints: Mapping[str, int]
) -> float | None:
    """Modeled time of the step; None where nothing was measured that says so: on this device, or of
    operands that are not aligned.
    """
    share = device.matmul_template
    if share is None or not is_aligned(made) or made.dtype not in (torch.bfloat16, torch.float16):
        return None
    slower = {dtype: rate * share for dtype, rate in device.matmul_flops.items()}
    return time(
        matmul_cost(made, program), replace(device, matmul_flops=slower), torch.float32, hints
    )
