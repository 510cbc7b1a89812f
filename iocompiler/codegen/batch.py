"""One kernel over many sets of tensors: which tensors, it reads from a table in memory.

A row of the table is a member: an address for every buffer, the bits of every by-value
number (as float64 or int64), and last the member's length. ``blocks`` tells each program its
member and which block of it.
"""

from __future__ import annotations

import torch

from iocompiler.codegen.expressions import TYPES
from iocompiler.codegen.kernel_writer import KernelWriter
from iocompiler.codegen.pointwise import write_row_of_points
from iocompiler.plan.data import Schedule
from iocompiler.tile.flat import LENGTH
from iocompiler.tile.program import Buffer, TileProgram

# the kernel's parameters, as a launch signature; ``aligned`` is 1 if every address is, to 16 bytes
SIGNATURE = "table_ptr:*i64:16 blocks_ptr:*i32:16 aligned:i32"


def emit_batch(program: TileProgram, schedule: Schedule, name: str) -> str:
    """The source of the kernel ``name`` for a flat program; `SIGNATURE` has its parameters."""
    width = len(program.buffers) + 1
    head = [
        "@triton.jit",
        f"def {name}(table_ptr, blocks_ptr, aligned):",
        '    """pointwise over many tensors: a row has the addresses and length of a member"""',
        "    member = tl.load(blocks_ptr + 2 * tl.program_id(0))",
        "    block = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1)",
        f"    row = table_ptr + member * {width}",
        f"    {LENGTH.name} = tl.load(row + {width - 1})",
        # neither a mask nor unknown alignment keeps whole blocks from moving 16 bytes a thread
        f"    if (aligned != 0) & ((block + 1) * {schedule.x_block} <= {LENGTH.name}):",
        *_body(program, schedule, whole=True),
        "    else:",
        *_body(program, schedule, whole=False),
    ]
    return "\n".join(head) + "\n"


def _body(program: TileProgram, schedule: Schedule, whole: bool) -> list[str]:
    writer = KernelWriter(program, schedule)
    writer.depth = 2
    for place, buffer in enumerate(program.buffers):
        writer.line(_argument(buffer, place, whole and buffer.elements != 1))
    write_row_of_points(writer, "block", masked=not whole)
    return writer.lines


def _argument(buffer: Buffer, place: int, aligned: bool) -> str:
    if buffer.role == "scalar":
        kind = "tl.float64" if buffer.dtype.is_floating_point else "tl.int64"
        held = (
            torch.float32
            if buffer.dtype.itemsize < 4 and buffer.dtype.is_floating_point
            else buffer.dtype
        )
        return f"{buffer.name} = tl.load(row + {place}).to({kind}, bitcast=True).to({TYPES[held]})"
    pointer = f"tl.load(row + {place}).to(tl.pointer_type({TYPES[buffer.dtype]}))"
    return f"{buffer.name}_ptr = " + (f"tl.multiple_of({pointer}, 16)" if aligned else pointer)
