"""What a step of the matmul template takes with its tile, against the library's call and the kernel
behind it: for choosing between the two, so both are priced on one rate of the device.

Of the template's tiles every slot of the device has as many as the fullest one, and each is filled
as the library's are (`roofline.FILL_K`). What an epilogue reads comes beside the next operands;
what it computes and stores does not. On an H100 SXM (torch 2.11, Triton 3.6), 59 regions of 8192
and 2048 rows, bias and GELU, residuals and gates: with the library's own time in place of its
modeled one, the error's median is 1.3 %, the most 9 %; the choice is right for 58, and costs 0.3 %
for the other. These are the rows that the share and `AROUND_S` were fitted to: others may do worse,
and regions of less than 19 us were not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from iocompiler.cost_model.cost import value_of
from iocompiler.cost_model.device import Device
from iocompiler.cost_model.matmul import epilogue_traffic, is_aligned
from iocompiler.cost_model.matmul_work import Work, units_share
from iocompiler.cost_model.roofline import FILL_K, TRANSCENDENTAL_FLOPS, vector_rate
from iocompiler.plan.column_sums import rows_of_part
from iocompiler.plan.product import MatmulTile, Product
from iocompiler.tile.index import Size
from iocompiler.tile.program import TileProgram

DTYPES = (torch.bfloat16, torch.float16)
LEAST_SIDE = 64
"""Of a tile that was measured: lower ones are made by other instructions."""
SUM_FLOPS = 6400
"""Of summing an element down its column, over the rows of a part: few warps wait for each other.
Three shapes on an H100, with a GELU's gradient and with a product: 50 flops (0.75 ps) an element in
parts of 128 rows, 100 in parts of 64, at most.
"""
AROUND_S = 2.6e-6
"""Before the first product, descriptors are made and operands waited for, as they are behind the
last, for its epilogue: with the launch, what every row of the measurement has and no size
explains."""


@dataclass(frozen=True)
class TemplateTime:
    """Where the time of a step goes, in seconds.

    Attributes:
        contracting: of the products at the library's rate, so of a share of 1.
        reading: of operands and what the epilogue reads, beside the products.
        apart: of what nothing else hides.
    """

    contracting: float
    reading: float
    apart: float

    def at(self, share: float) -> float:
        """The whole, where products reach this share of the library's rate."""
        return max(self.contracting / share, self.reading) + self.apart

    def share(self, seconds: float) -> float:
        """That of which the whole takes ``seconds``: infinite where all else takes longer."""
        left = seconds - self.apart
        return self.contracting / left if left > 0 else float("inf")


def template_time(
    made: Product,
    program: TileProgram,
    tile: MatmulTile,
    device: Device,
    hints: Mapping[str, int],
) -> TemplateTime:
    """Of the products, and of epilogues that store one or several tensors."""
    launch = Work(made, program, device, hints)
    slots = tile.programs or device.sm_count * launch.resident(tile)
    filled = -(-launch.tiles(tile) // slots) * slots
    depth = launch.steps(tile) * tile.k + FILL_K
    flops = 2 * filled * tile.m * tile.n * depth * len(made.rights)
    rate = device.matmul_rate(made.dtype) * units_share(tile, len(made.rights), hopper=True)
    read: Size = 0
    written: Size = 0
    work: Size = 0
    for each, epilogue in ((made, program), *made.beside):
        moved = epilogue_traffic(each, epilogue)
        read += sum(each.elements_read, 0) * made.dtype.itemsize + moved.read_bytes
        written += moved.written_bytes
        work += moved.flops + TRANSCENDENTAL_FLOPS * moved.transcendentals
        sums = sum(op.kind == "reduce" for op in epilogue.ops)
        work += sums * (SUM_FLOPS // rows_of_part(epilogue)) * each.batch * each.m * each.n
    return TemplateTime(
        flops / rate,
        value_of(read, hints) / device.memory_rate,
        device.launch_s
        + AROUND_S
        + value_of(written, hints) / device.memory_rate
        + value_of(work, hints) / vector_rate(device, torch.float32),
    )


def matmul_seconds(
    made: Product,
    program: TileProgram,
    tile: MatmulTile,
    device: Device,
    hints: Mapping[str, int],
) -> float | None:
    """Modeled time of the step; None where nothing was measured that says so: on this device, of
    operands that are not aligned, in float32, of low or narrow tiles.
    """
    share = device.matmul_template
    if share is None or not is_aligned(made) or made.dtype not in DTYPES:
        return None
    if min(tile.m, tile.n) < LEAST_SIDE:
        return None
    return template_time(made, program, tile, device, hints).at(share)
