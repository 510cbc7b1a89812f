"""Which blocks of the scores a mask leaves that reads tensors: asked score by score, once a call.

A block is 0 where nothing is kept, 2 where all is, else 1. What lies beyond the last row or column
says nothing.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["own_heads", "rows", "columns"])
def classify_blocks(
    Classes, operands, strides, numbers, own_heads, rows, columns,
    keep: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block; Classes [own batch, own heads, M, N] int8, contiguous."""
    across = tl.cdiv(columns, BLOCK_N)
    down = tl.cdiv(rows, BLOCK_M)
    n = tl.program_id(0) % across
    m = tl.program_id(0) // across % down
    z = tl.program_id(0) // (across * down)
    b = z // own_heads
    h = z % own_heads
    i = tl.minimum(m * BLOCK_M + tl.arange(0, BLOCK_M), rows - 1)[:, None]
    j = tl.minimum(n * BLOCK_N + tl.arange(0, BLOCK_N), columns - 1)[None, :]
    kept = keep(b, h, i, j, operands, strides, numbers)
    kept = tl.broadcast_to(kept, (BLOCK_M, BLOCK_N)).to(tl.int32)
    some = tl.max(tl.max(kept, 1), 0)
    every = tl.min(tl.min(kept, 1), 0)
    tl.store(Classes + tl.program_id(0), (some + every).to(tl.int8))


@triton.jit(do_not_specialize=["rows", "count", "room", "short"])
def list_blocks(
    Classes, Table, class_strides, rows, count, room, short, BLOCK: tl.constexpr
):  # fmt: skip
    """One row of a table of ``attention_parts.py`` from classes [.., rows of blocks, count];
    ``short``: the last block reaches past the end, so it is never full.
    """
    z = tl.program_id(0) // rows
    row = tl.program_id(0) % rows
    place = tl.arange(0, BLOCK)
    line = Classes + z * class_strides[0] + row * class_strides[1]
    kind = tl.load(line + place * class_strides[2], mask=place < count, other=0).to(tl.int32)
    last = (place == count - 1) & (short != 0)
    full = ((kind == 2) & (last == 0)).to(tl.int32)
    partial = ((kind > 0) & (full == 0)).to(tl.int32)
    Table += tl.program_id(0).to(tl.int64) * (2 + 2 * room)
    tl.store(Table, tl.sum(partial, 0))
    tl.store(Table + 1, tl.sum(full, 0))
    tl.store(Table + 2 + tl.cumsum(partial, 0) - 1, place, mask=partial != 0)
    tl.store(Table + 2 + room + tl.cumsum(full, 0) - 1, place, mask=full != 0)
