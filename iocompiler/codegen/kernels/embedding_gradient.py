"""The gradient of an embedding table: its tokens in order, sums over equal ones, and what of those
reaches over the borders of chunks.

    table[v] (+)= sum of grad[t] over the tokens t with indices[t] == v

in float32, rounded once; the order of every sum is fixed by the indices alone. Tokens that lie in
no row (``padding``, or outside of 0 <= v < rows) have the key ``rows``, which comes last, and add
to nothing. In torch::

    kept = (indices >= 0) & (indices < rows) & (indices != padding)
    table.index_add_(0, indices[kept], grad[kept])
"""

import triton
import triton.language as tl


@triton.jit
def _keys(indices, tokens, count, rows, padding):
    """int32 keys of ``tokens``; behind the last of them 2^31 - 1, more than any key and one."""
    inside = tokens < count
    index = tl.load(indices + tokens, mask=inside, other=0)
    kept = (index >= 0) & (index < rows) & (index != padding)
    return tl.where(inside, tl.where(kept, index, rows).to(tl.int32), 2147483647)


@triton.jit(do_not_specialize=["count", "rows", "padding"])
def embedding_order(
    indices,
    order,
    keys,
    count,
    rows,
    padding,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """A stable sort by counting; one program BLOCK_M tokens, which divides BLOCK_N.

        place(t) = |{u : key(u) < key(t)}| + |{u < t : key(u) == key(t)}|
        order[place(t)] = t;  keys[place(t)] = key(t)

    ``indices`` [count] are contiguous, ``order`` and ``keys`` int32 [count]. AHEAD tiles of BLOCK_N
    others are on their way at a time.
    """
    first = tl.program_id(0) * BLOCK_M
    edge = first // BLOCK_N * BLOCK_N
    # a column of the first tile, a row of the second: each thread counts others of its own
    tokens = first + tl.arange(0, BLOCK_M)[:, None]
    others = tl.arange(0, BLOCK_N)[None, :]
    mine = _keys(indices, tokens, count, rows, padding)
    # the sign of a difference is one instruction to add; a comparison is three
    less = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, edge, AHEAD * BLOCK_N):  # all of them stand before: equal ones count
        for i in tl.static_range(AHEAD):
            theirs = _keys(indices, start + i * BLOCK_N + others, edge, rows, padding)
            less += (theirs - (mine + 1)) >> 31
    theirs = _keys(indices, edge + others, count, rows, padding)
    less += (theirs - (mine + (edge + others < tokens).to(tl.int32))) >> 31
    for start in range(edge + BLOCK_N, count, AHEAD * BLOCK_N):
        for i in tl.static_range(AHEAD):
            theirs = _keys(indices, start + i * BLOCK_N + others, count, rows, padding)
            less += (theirs - mine) >> 31
    place = -tl.sum(less, 1)[:, None]
    tl.store(order + place, tokens, mask=tokens < count)
    tl.store(keys + place, mine, mask=tokens < count)


@triton.jit(do_not_specialize=["count", "rows", "padding"])
def embedding_keys(indices, keys, count, rows, padding, BLOCK: tl.constexpr):
    """``keys`` int32 [count] in the order of the tokens, for a sort of the library's."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = _keys(indices, tokens, count, rows, padding)
    tl.store(keys + tokens, found, mask=tokens < count)


@triton.jit(do_not_specialize=["count", "rows"])
def embedding_sums(
    grad,
    order,
    keys,
    table,
    parts,
    count,
    rows,
    width,
    grad_stride,
    ADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program CHUNK places in the order of the tokens by BLOCK columns.

    Of a segment (places of equal keys) that lies within the chunk the sum becomes a row of
    ``table`` [rows, width], added to what stands there where ADDED. Of one that reaches over a
    border, the chunk's share goes to ``parts`` float32 [chunks, 2, width]: first the end of a
    segment that begins before the chunk, second the beginning of one that goes on behind it.

    Rows of ``grad`` [count, width] begin ``grad_stride`` apart; ``table`` is contiguous.
    """
    blocks = tl.cdiv(width, BLOCK)
    chunk = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    first = chunk * CHUNK
    # of all rows before anything is written: loads do not move up past stores
    keys_here = ()
    values = ()
    standing = ()
    for i in tl.static_range(CHUNK):
        place = first + i
        key = tl.load(keys + place, mask=place < count, other=rows)
        token = tl.load(order + place, mask=place < count, other=0).to(tl.int64)
        some = inside & (key < rows)
        keys_here += (key,)
        values += (tl.load(grad + token * grad_stride + columns, mask=some, other=0.0),)
        if ADDED:
            standing += (tl.load(table + key.to(tl.int64) * width + columns, mask=some, other=0.0),)
    previous = tl.load(keys + first - 1, mask=first > 0, other=-1)
    behind = tl.load(keys + first + CHUNK, mask=first + CHUNK < count, other=-1)
    begun = False
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(CHUNK):
        key = keys_here[i]
        begins = key != previous
        begun |= begins
        value = values[i].to(tl.float32)
        total = tl.where(begins, value, total + value)
        if i == CHUNK - 1:
            ends = key != behind
        else:
            ends = key != keys_here[i + 1]
        some = inside & (key < rows)
        result = total
        if ADDED:
            result += standing[i].to(tl.float32)
        into = table + key.to(tl.int64) * width + columns
        tl.store(into, result.to(table.dtype.element_ty), mask=some & ends & begun)
        at = parts + chunk.to(tl.int64) * 2 * width + columns
        tl.store(at, total, mask=some & ends & ~begun)
        if i == CHUNK - 1:
            tl.store(at + begun * width, total, mask=some & ~ends)
        previous = key


@triton.jit(do_not_specialize=["count", "rows"])
def embedding_fold(
    keys,
    table,
    parts,
    count,
    rows,
    width,
    ADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What `embedding_sums` left in ``parts``, added up by the programs of the chunk where a
    segment begins, BLOCK_C chunks at a time, and written (or added, ADDED) to its row.
    """
    blocks = tl.cdiv(width, BLOCK)
    chunk = tl.program_id(0) // blocks
    first = chunk * CHUNK
    border = first + CHUNK
    if border >= count:
        return
    key = tl.load(keys + border - 1)
    going_on = (key < rows) & (tl.load(keys + border) == key)
    before = tl.load(keys + first - 1, mask=first > 0, other=-1)
    if (not going_on) | (before == key):
        return
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.load(parts + (chunk.to(tl.int64) * 2 + 1) * width + columns, mask=inside, other=0.0)
    follows = chunk + 1
    while going_on:
        more = follows + tl.arange(0, BLOCK_C)
        start = tl.minimum(more * CHUNK, count)
        same = tl.load(keys + start, mask=start < count, other=-1) == key
        at = more.to(tl.int64)[:, None] * 2 * width + columns[None, :]
        some = same[:, None] & inside[None, :]
        total += tl.sum(tl.load(parts + at, mask=some, other=0.0), 0)
        follows += BLOCK_C
        going_on = tl.min(same.to(tl.int32), 0) != 0
    into = table + key.to(tl.int64) * width + columns
    if ADDED:
        total += tl.load(into, mask=inside, other=0.0).to(tl.float32)
    tl.store(into, total.to(table.dtype.element_ty), mask=inside)
