"""One kernel over many sets of tensors: which tensors, it reads from a table in memory.

A row of the table is a member: an address for every buffer, the bits of every by-value
number (as float64 or int64), the rows it folds where it does, and last the member's length.
``blocks`` tells each program its member and which block of it. Where the schedule has programs walk
the blocks, they take them in turns, each until ``blocks`` has -1 for its member.
"""

from __future__ import annotations

import torch

from iocompiler.codegen.expressions import TYPES
from iocompiler.codegen.kernel_writer import KernelWriter
from iocompiler.codegen.loops import write_looped
from iocompiler.codegen.pointwise import write_row_of_points
from iocompiler.plan.data import Schedule
from iocompiler.tile.flat import LENGTH, PARTS
from iocompiler.tile.program import Buffer, TileProgram

# the kernel's parameters, as a launch signature; ``aligned`` is 1 if every address is, to 16 bytes
SIGNATURE = "table_ptr:*i64:16 blocks_ptr:*i32:16 aligned:i32"


UNIT = 16
"""What the length of a fold's members must be a multiple of for their rows to be aligned."""


def numbers_of(program: TileProgram) -> str:
    """For all of a member's row but its length: "p" an address, "f" or "i" a number by value."""
    buffers = "".join(
        "p" if b.role != "scalar" else "f" if b.dtype.is_floating_point else "i"
        for b in program.buffers
    )
    return buffers + "i" * bool(program.reduced)


def emit_batch(program: TileProgram, schedule: Schedule, name: str) -> str:
    """The source of the kernel ``name`` for a flat program or a fold; `SIGNATURE` has its
    parameters.
    """
    kind = "folded rows" if program.reduced else "pointwise"
    head = [
        "@triton.jit",
        f"def {name}(table_ptr, blocks_ptr, aligned):",
        f'    """{kind} over many tensors: a row has the addresses and length of a member"""',
        "    member = tl.load(blocks_ptr + 2 * tl.program_id(0))",
        "    block = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1)",
        *(_walk(program, schedule) if schedule.programs else _block(program, schedule, 1)),
    ]
    return "\n".join(head) + "\n"


def _walk(program: TileProgram, schedule: Schedule) -> list[str]:
    """The loop over a program's blocks: which is next is on its way while one is worked on."""
    return [
        "    place = blocks_ptr + 2 * tl.program_id(0)",
        "    while member >= 0:",
        "        place += 2 * tl.num_programs(0)",
        "        next_member = tl.load(place)",
        "        next_block = tl.load(place + 1)",
        *_block(program, schedule, 2),
        "        member = next_member",
        "        block = next_block",
    ]


def _block(program: TileProgram, schedule: Schedule, depth: int) -> list[str]:
    """The work on the block ``block`` of ``member``, indented ``depth`` times."""
    width = len(program.buffers) + 1 + bool(program.reduced)
    indent = "    " * depth
    return [
        f"{indent}row = table_ptr + member * {width}",
        f"{indent}{LENGTH.name} = tl.load(row + {width - 1})",
        # neither a mask nor unknown alignment keeps whole blocks from moving 16 bytes a thread
        f"{indent}if (aligned != 0) & ((block + 1) * {schedule.x_block} <= {LENGTH.name}):",
        *_body(program, schedule, depth + 1, whole=True),
        f"{indent}else:",
        *_body(program, schedule, depth + 1, whole=False),
    ]


def _body(program: TileProgram, schedule: Schedule, depth: int, whole: bool) -> list[str]:
    writer = KernelWriter(program, schedule)
    writer.depth = depth
    for place, buffer in enumerate(program.buffers):
        writer.line(_argument(buffer, place, whole and buffer.elements != 1))
    if not program.reduced:
        write_row_of_points(writer, "block", masked=not whole)
        return writer.lines
    place = len(program.buffers)
    writer.line(f"{PARTS.name} = tl.load(row + {place})")
    if whole:  # each row of a member begins as aligned as the first
        writer.line(f"{LENGTH.name} = tl.multiple_of(tl.load(row + {place + 1}), {UNIT})")
    write_looped(writer, "block", masked=not whole)
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
