"""Which row of blocks a program of an attention kernel takes, and the table of blocks it visits.

A table says for each row of blocks (of queries, or of keys in the kernel that walks over queries)
which blocks are visited: *full* ones, in which every score is kept, and *partial* ones, in which a
score may not be. It is one tensor of int32 [B or 1, H or 1, rows of blocks, length]:

- with RANGES, four numbers a row: the first block that is not empty, how many partial ones follow,
  then how many full ones, then how many partial ones again;
- else the number of partial blocks, the number of full ones, then the positions of the partial
  ones, then those of the full ones, each with ``room`` for all; last, in the n-th row, which row
  has the n-th most blocks.
"""

import triton
import triton.language as tl


@triton.jit
def place_of(blocks, together, ahead):
    """(head, which of its ``blocks`` rows, counted from the one that comes first) of this program.

    The first rows of all heads, ``ahead`` of each, start before all others; then so many heads take
    turns with the rest as fit in L2 ``together``. Programs that take long so start early, and short
    ones end the kernel.
    """
    heads = tl.num_programs(0) // blocks
    program = tl.program_id(0) - heads * ahead
    left = tl.maximum(blocks - ahead, 1)
    first = tl.maximum(program, 0) // (left * together) * together
    turn = program - first * left
    taking = tl.minimum(together, heads - first)
    early = program < 0
    return (
        tl.where(early, tl.program_id(0) % heads, first + turn % taking),
        tl.where(early, tl.program_id(0) // heads, ahead + turn // taking),
    )


@triton.jit
def part_of(place, of_keys, ahead, GROUP: tl.constexpr, PARTS: tl.constexpr):
    """(whether a program is of keys or of queries, its place among these). Of PARTS "both" the
    first rows of both, ``ahead`` of keys and of the queries of each of GROUP heads, come before the
    other keys, the other queries last.
    """
    of_key = place < of_keys
    if PARTS == "both":
        queries = ahead * GROUP
        early = place < ahead
        of_key = early | ((place >= ahead + queries) & (place < of_keys + queries))
        key = tl.where(early, place, place - queries)
        query = tl.where(place < ahead + queries, place - ahead, place - of_keys)
        place = tl.where(of_key, key, query)
    return of_key, place


@triton.jit
def row_in_order(
    table, table_strides, b, h, place, blocks, room, RANGES: tl.constexpr, LATE: tl.constexpr
):  # fmt: skip
    """The row that comes at a place: those with many blocks first; with RANGES, which a causal mask
    has, LATE ones.
    """
    if RANGES:
        row = blocks - 1 - place if LATE else place
    else:
        table += b * table_strides[0] + h * table_strides[1] + place * table_strides[2]
        row = tl.load(table + 2 + 2 * room)
    return row


@triton.jit
def table_row(table, table_strides, b, h, row, RANGES: tl.constexpr):
    """(what `table_entry` needs of a row, number of partial blocks, number of full blocks)."""
    table += b * table_strides[0] + h * table_strides[1] + row * table_strides[2]
    first = tl.load(table)
    second = tl.load(table + 1)
    if RANGES:
        full = tl.load(table + 2)
        partial = second + tl.load(table + 3)
    else:
        full = second
        partial = first
    return (table, first, second, full), partial, full


@triton.jit
def table_entry(visited, entry, room, RANGES: tl.constexpr, PARTIAL: tl.constexpr):
    """The position of the n-th partial or full block of a row; behind the last one, any number."""
    table, first, left, full = visited
    if RANGES:
        if PARTIAL:
            found = first + entry + tl.where(entry < left, 0, full)
        else:
            found = first + left + entry
    else:
        if PARTIAL:
            found = tl.load(table + 2 + entry)
        else:
            found = tl.load(table + 2 + room + entry)
    return found


@triton.jit
def in_turn(following, visited, entry, room, RANGES: tl.constexpr, PARTIAL: tl.constexpr):
    """The n-th block in a loop over all, and what its next turn is given as ``following``; the
    first turn, `table_entry` of 0.

    Full blocks are asked for a turn ahead: where a load's result is in its own turn no more than an
    address, Triton makes a copy of it that is waited for, and with it for the tiles that were to be
    read ahead. (Of partial blocks a turn also asks what lies inside.)
    """
    block = following
    if PARTIAL:
        block = table_entry(visited, entry, room, RANGES, PARTIAL)
    else:
        following = table_entry(visited, entry + 1, room, RANGES, PARTIAL)
    return block, following
