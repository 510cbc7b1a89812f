"""Which blocks of the scores a mask leaves that reads tensors: asked score by score, once a call.

A block is 0 where nothing is kept, 2 where all is, else 1. What lies beyond the last row or column
says nothing.
"""

import triton
import triton.language as tl


@triton.jit
def _kept(
    b, h, i, j, operands, strides, numbers,
    keep: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """How many scores of a block are kept: none and all are what is asked."""
    kept = tl.broadcast_to(keep(b, h, i, j, operands, strides, numbers), (BLOCK_M, BLOCK_N))
    # over no axis in particular: threads add up what they have before they meet
    return tl.sum(kept.to(tl.int32))


@triton.jit(do_not_specialize=["own_heads", "rows", "columns"])
def classify_blocks(
    Classes, Reach, reach_strides, operands, strides, numbers, own_heads, rows, columns,
    keep: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """COUNT blocks of one row; Classes [own batch, own heads, M, N] int8, contiguous. Reach
    [.., M, 2] int32: the first and the last block of a row that are not known to be empty.
    """
    across = tl.cdiv(columns, BLOCK_N)
    down = tl.cdiv(rows, BLOCK_M)
    pieces = tl.cdiv(across, COUNT)
    start = tl.program_id(0) % pieces * COUNT
    m = tl.program_id(0) // pieces % down
    z = tl.program_id(0) // (pieces * down)
    b = z // own_heads
    h = z % own_heads
    Reach += b * reach_strides[0] + h * reach_strides[1] + m * reach_strides[2]
    first = tl.maximum(tl.load(Reach), start)
    last = tl.minimum(tl.load(Reach + 1), start + COUNT - 1)
    i = tl.minimum(m * BLOCK_M + tl.arange(0, BLOCK_M), rows - 1)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    place = start + tl.arange(0, COUNT)
    kinds = tl.zeros((COUNT,), tl.int32)
    for n in range(first, last + 1):
        j = n * BLOCK_N + column
        if (n + 1) * BLOCK_N <= columns:  # elements side by side are seen to be, and read at once
            count = _kept(b, h, i, j, operands, strides, numbers, keep, BLOCK_M, BLOCK_N)
        else:
            j = tl.minimum(j, columns - 1)
            count = _kept(b, h, i, j, operands, strides, numbers, keep, BLOCK_M, BLOCK_N)
        kind = (count > 0).to(tl.int32) + (count == BLOCK_M * BLOCK_N).to(tl.int32)
        kinds = tl.where(place == n, kind, kinds)
    line = (z.to(tl.int64) * down + m) * across
    tl.store(Classes + line + place, kinds.to(tl.int8), mask=place < across)


@triton.jit(do_not_specialize=["class_rows", "class_columns", "rows", "count", "room", "short"])
def list_blocks(
    Classes, Table, class_strides, class_rows, class_columns, rows, count, room, short,
    DOWN: tl.constexpr, ACROSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a table of ``attention_table.py`` but for its last column, of ``count`` blocks,
    each of DOWN x ACROSS classes [.., class_rows, class_columns]; ``short``: the last block reaches
    past the end, so it is never full.
    """
    z = tl.program_id(0) // rows
    row = tl.program_id(0) % rows
    place = tl.arange(0, BLOCK)
    Classes += z * class_strides[0]
    least = tl.full((BLOCK,), 2, tl.int32)
    most = tl.zeros((BLOCK,), tl.int32)
    for part in tl.static_range(DOWN * ACROSS):
        down = tl.minimum(row * DOWN + part // ACROSS, class_rows - 1)
        across = tl.minimum(place * ACROSS + part % ACROSS, class_columns - 1)
        kind = Classes + down * class_strides[1] + across * class_strides[2]
        kind = tl.load(kind, mask=place < count, other=0).to(tl.int32)
        least = tl.minimum(least, kind)
        most = tl.maximum(most, kind)
    last = (place == count - 1) & (short != 0)
    full = ((least == 2) & (last == 0)).to(tl.int32)
    partial = ((most > 0) & (full == 0)).to(tl.int32)
    Table += tl.program_id(0).to(tl.int64) * (3 + 2 * room)
    tl.store(Table, tl.sum(partial, 0))
    tl.store(Table + 1, tl.sum(full, 0))
    tl.store(Table + 2 + tl.cumsum(partial, 0) - 1, place, mask=partial != 0)
    tl.store(Table + 2 + room + tl.cumsum(full, 0) - 1, place, mask=full != 0)


@triton.jit(do_not_specialize=["rows", "room"])
def order_rows(Table, rows, room, BLOCK: tl.constexpr):
    """The last column of a table: each row writes itself to the place of its rank by how many
    blocks it has, later rows first among equal ones.
    """
    parts = tl.cdiv(rows, BLOCK)
    z = tl.program_id(0) // parts
    length = 3 + 2 * room
    Table += z.to(tl.int64) * rows * length
    row = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    own = _blocks(Table, row, rows, length)[:, None]
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, BLOCK):
        other = start + tl.arange(0, BLOCK)
        theirs = _blocks(Table, other, rows, length)[None, :]
        later = other[None, :] > row[:, None]
        rank += tl.sum(((theirs > own) | ((theirs == own) & later)).to(tl.int32), 1)
    tl.store(Table + rank * length + (length - 1), row, mask=row < rows)


@triton.jit
def _blocks(Table, row, rows, length):
    """How many blocks rows have; -1 beyond the last one."""
    at = Table + row * length
    partial = tl.load(at, mask=row < rows, other=-1)
    return partial + tl.load(at + 1, mask=row < rows, other=0)
