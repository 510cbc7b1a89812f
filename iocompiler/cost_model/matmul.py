"""What a step of the matmul template moves and computes."""

from __future__ import annotations

from dataclasses import replace

from iocompiler.cost_model.cost import Contraction, Cost
from iocompiler.plan.product import Product
from iocompiler.tile.program import TileProgram
from iocompiler.tile.traffic import Traffic, traffic


def matmul_cost(made: Product, program: TileProgram) -> Cost:
    """Operands once, what the epilogue reads and writes once, the arithmetic of both."""
    rights = len(made.rights)
    moved = epilogue_traffic(made, program)
    operands = sum(made.elements_read, 0) * made.dtype.itemsize
    depths = (*[made.k] * rights, *made.depths[1:])
    inner = tuple(
        Contraction(made.batch, made.m, made.n, k, made.dtype, is_aligned(made)) for k in depths
    )
    own = Cost(
        moved.read_bytes + operands,
        moved.written_bytes,
        moved.flops + sum((each.flops for each in inner), 0),
        moved.transcendentals,
        inner,
    )
    return sum((matmul_cost(*other) for other in made.beside), own)


def epilogue_traffic(made: Product, program: TileProgram) -> Traffic:
    """What the epilogue moves to and from memory: the sums are in registers."""
    sums = {buffer.name for buffer in program.buffers[: len(made.rights)]}
    stored = tuple(buffer for buffer in program.buffers if buffer.name not in sums)
    return traffic(replace(program, buffers=stored))


def is_aligned(made: Product) -> bool:
    """Whether rows of every operand start on boundaries that its loads need to be whole."""
    if not made.aligned or not all(is_aligned(other) for other, _ in made.beside):
        return False
    for row, column, batch in (*made.lefts, *made.all_rights):
        leading = row if column == 1 else column if row == 1 else None
        if leading is None or not (made.is_whole(leading) and made.is_whole(batch)):
            return False
    return True
