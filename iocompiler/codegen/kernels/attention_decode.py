"""Attention of few queries over many keys: the keys of a head are shared out among programs.

With top_p, total_p and acc_p the online softmax of part p of the keys (``attention.py``):

    top = max_p top_p            total = sum_p 2^(top_p - top) total_p
    out = sum_p 2^(top_p - top) acc_p / total

Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference" (2023). The query heads
that share a key head are rows of one tile, beside their queries: keys and values are read once.
Part p of P has the blocks p, p + P, p + 2 P, ... of keys, so that what a mask leaves is shared
evenly, wherever it lies. One program and one order for each sum: results repeat bit for bit.
"""

import triton
import triton.language as tl

from iocompiler.codegen.kernels.attention_parts import (
    attend,
    finished,
    head_of,
    load_tile,
    nothing_seen,
    row_of,
    store_tile,
)


@triton.jit
def _kept_blocks(
    b, h, i, operands, strides, numbers, columns, part, parts, count,
    keep: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The first and the last of a part's blocks in which something is kept; (count, -1) if none."""
    place = tl.arange(0, WIDE)
    first = tl.full((BLOCK_M, WIDE), count, tl.int32)
    last = tl.full((BLOCK_M, WIDE), -1, tl.int32)
    for start in range(0, count, WIDE // BLOCK_N):
        block = start + place // BLOCK_N
        column = (block * parts + part) * BLOCK_N + place % BLOCK_N
        j = tl.minimum(column, columns - 1)[None, :]
        kept = (column < columns)[None, :] & keep(b, h, i, j, operands, strides, numbers)
        first = tl.where(kept, tl.minimum(first, block[None, :]), first)
        last = tl.where(kept, tl.maximum(last, block[None, :]), last)
    return tl.min(tl.min(first, 1), 0), tl.max(tl.max(last, 1), 0)


@triton.jit
def _mean_if(
    wanted, V, stride, width_stride, columns,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The mean of all values of a head [1, E], which few rows ask for."""
    e = tl.arange(0, BLOCK_E)
    column = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for start in range(0, tl.where(wanted, columns, 0), BLOCK_N):
        inside = tl.minimum(start + column, columns - 1).to(tl.int64)
        v = load_tile(V, inside, stride, e, width_stride, E, BLOCK_E)
        total += tl.where((start + column < columns)[:, None], v.to(tl.float32), 0.0)
    return (tl.sum(total, 0) / columns)[None, :]


@triton.jit(
    do_not_specialize=["groups", "rows", "columns", "parts", "lines"],
    do_not_specialize_on_alignment=["Seed"],
)
def attention_split(
    Q, K, V, Out, Lse, Rest, Seed, Acc,
    q_strides, k_strides, v_strides, out_strides,
    operands, strides, numbers, groups, rows, columns, parts, lines,
    score: tl.constexpr, lift: tl.constexpr, FACTOR: tl.constexpr, keep: tl.constexpr,
    drop: tl.constexpr, KEPT: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EMPTY: tl.constexpr, PLANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one key head, for one tile of its GROUP * rows queries.

    Q [B, H, S, D], K [B, G, K, D], V [B, G, K, E], Out [B, H, S, E], any strides; Lse and Rest as
    in ``attention.py``. Where there are several parts, Acc [lines, E] is written instead, float32,
    contiguous, with lines = B * H * S * parts, and behind it their tops and totals, [2, lines].
    """
    packed = GROUP * rows
    tiles = tl.cdiv(packed, BLOCK_M)
    # tiles of the same keys run at the same time
    m = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles % parts
    z = tl.program_id(0) // (tiles * parts)
    b = z // groups
    g = z % groups
    query = m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tl.minimum(query, packed - 1)  # what lies beyond the last query is not stored
    h_line = g * GROUP + inside // rows
    i_line = inside % rows
    h = h_line[:, None]
    i = i_line[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    pointers = row_of(Q, q_strides, b, h, i) + d * q_strides[3]
    if D < BLOCK_D:
        q = tl.load(pointers, mask=d < D, other=0.0)
    else:
        q = tl.load(pointers)
    K = head_of(K, k_strides, b, g)
    V = head_of(V, v_strides, b, g)
    seed = tl.load(Seed) if drop is not None else 0
    acc, total, top = nothing_seen(BLOCK_M, BLOCK_E)
    count = tl.cdiv(tl.cdiv(columns, BLOCK_N) - part, parts)
    first = 0 * count
    last = count - 1
    if keep is not None:
        first, last = _kept_blocks(b, h, i, operands, strides, numbers, columns, part, parts, count,
                                   keep, BLOCK_M, BLOCK_N, 4 * BLOCK_N)  # fmt: skip
    for block in range(first, last + 1):
        acc, total, top = attend(
            acc, total, top, q, K, V, k_strides, v_strides, b, h, i, h_line, i_line, 0 * m, i,
            operands, strides, numbers, seed, (block * parts + part) * BLOCK_N, columns,
            score, lift, FACTOR, keep, drop,
            D, E, BLOCK_D, BLOCK_E, BLOCK_N, True, PLANES, PRECISION,
        )  # fmt: skip
    own = query < packed
    e = tl.arange(0, BLOCK_E)
    row = z.to(tl.int64) * packed + query
    if parts == 1:
        mean = 0.0
        if EMPTY == "uniform":
            mean = _mean_if(tl.min(total, 0) == 0.0, V, v_strides[2], v_strides[3], columns,
                            E, BLOCK_E, BLOCK_N)  # fmt: skip
        out, lse, rest = finished(acc, total, top, mean, KEPT, EMPTY, PLANES)
        if PLANES > 0:
            tl.store(Lse + row, lse, mask=own)
        if PLANES == 2:
            tl.store(Rest + row, rest, mask=own)
        place = row_of(Out, out_strides, b, h, i) + e[None, :] * out_strides[3]
        tl.store(place, out.to(Out.dtype.element_ty), mask=own[:, None] & (e < E)[None, :])
    else:
        line = row * parts + part
        sums = Acc + lines.to(tl.int64) * E + line
        tl.store(sums, top, mask=own)
        tl.store(sums + lines, total, mask=own)
        tl.store(Acc + line[:, None] * E + e[None, :], acc, mask=own[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["heads", "rows", "columns", "parts", "lines"])
def attention_combine(
    Acc, V, Out, Lse, Rest, v_strides, out_strides, heads, rows, columns, parts, lines,
    GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, KEPT: tl.constexpr, EMPTY: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """One query of one head: its parts put together."""
    line = tl.program_id(0)
    i = line % rows
    h = line // rows % heads
    b = line // (rows * heads)
    e = tl.arange(0, BLOCK_E)
    p = tl.arange(0, BLOCK_P)
    Tops = Acc + lines.to(tl.int64) * E + line.to(tl.int64) * parts
    Totals = Tops + lines
    Acc += line.to(tl.int64) * parts * E
    tops = tl.full((BLOCK_P,), float("-inf"), tl.float32)
    for start in range(0, parts, BLOCK_P):
        found = tl.load(Tops + start + p, mask=start + p < parts, other=float("-inf"))
        tops = tl.maximum(tops, found)
    top = tl.max(tops, 0)
    total = tl.zeros((BLOCK_P,), tl.float32)
    acc = tl.zeros((BLOCK_P, BLOCK_E), tl.float32)
    for start in range(0, parts, BLOCK_P):
        there = start + p < parts
        tops = tl.load(Tops + start + p, mask=there, other=float("-inf"))
        weight = tl.exp2(tops - top)  # tops are finite: see `nothing_seen`
        total += weight * tl.load(Totals + start + p, mask=there, other=0.0)
        pointers = Acc + (start + p)[:, None] * E + e[None, :]
        tile = tl.load(pointers, mask=there[:, None] & (e < E)[None, :], other=0.0)
        acc += weight[:, None] * tile
    # a tile of one row
    acc = tl.sum(acc, 0)[None, :]
    total = tl.sum(total, 0) + tl.zeros((1,), tl.float32)
    top = top + tl.zeros((1,), tl.float32)
    mean = 0.0
    if EMPTY == "uniform":
        V = head_of(V, v_strides, b, h // GROUP)
        mean = _mean_if(tl.min(total, 0) == 0.0, V, v_strides[2], v_strides[3], columns,
                        E, BLOCK_E, BLOCK_N)  # fmt: skip
    acc, lse, rest = finished(acc, total, top, mean, KEPT, EMPTY, PLANES)
    one = tl.arange(0, 1)
    if PLANES > 0:
        tl.store(Lse + line + one, lse)
    if PLANES == 2:
        tl.store(Rest + line + one, rest)
    store_tile(row_of(Out, out_strides, b, h, i), one, out_strides[2], e, out_strides[3], acc, 1,
               E, BLOCK_E)  # fmt: skip
