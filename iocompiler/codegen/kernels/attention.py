"""Attention with a score program, forward.

    s_ij = score(q_i . k_j, b, h, i, j)    where keep(b, h, i, j), else -inf
    out_i = sum_j softmax_j(s_ij) v_j      or, with no PLANES of an lse, sum_j s_ij v_j

Tri Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 1; the softmax is Milakov and Gimelshein's
online one, arXiv 1805.02867. Scores are in units of log2(e), so that powers are of two.
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
from iocompiler.codegen.kernels.attention_table import (
    in_turn,
    place_of,
    row_in_order,
    table_entry,
    table_row,
)


@triton.jit
def _attend(
    acc, total, top, q, K, V, k_strides, v_strides, b, h, i, i_line, first, row,
    operands, strides, numbers, seed, visited, count, room, columns,
    score: tl.constexpr, lift: tl.constexpr, FACTOR: tl.constexpr, keep: tl.constexpr,
    drop: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    RANGES: tl.constexpr, PARTIAL: tl.constexpr, PLANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the partial or the full blocks of keys of one block of queries."""
    following = table_entry(visited, 0, room, RANGES, PARTIAL)
    for entry in range(count):
        block, following = in_turn(following, visited, entry, room, RANGES, PARTIAL)
        start = block * BLOCK_N
        acc, total, top = attend(
            acc, total, top, q, K, V, k_strides, v_strides, b, h, i, h, i_line, first, row,
            operands, strides, numbers, seed, start, columns, score, lift, FACTOR, keep, drop,
            D, E, BLOCK_D, BLOCK_E, BLOCK_N, PARTIAL, PLANES, PRECISION,
        )  # fmt: skip
    return acc, total, top


@triton.jit(
    do_not_specialize=["heads", "rows", "columns", "room", "together", "ahead"],
    do_not_specialize_on_alignment=["Seed"],
)
def attention_forward(
    Q, K, V, Mean, Out, Lse, Rest, Seed,
    q_strides, k_strides, v_strides, mean_strides, out_strides,
    operands, strides, numbers, table, table_strides, heads, rows, columns, room, together,
    ahead,
    score: tl.constexpr, lift: tl.constexpr, FACTOR: tl.constexpr, keep: tl.constexpr,
    drop: tl.constexpr, KEPT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RANGES: tl.constexpr, EMPTY: tl.constexpr, PLANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head.

    Q [B, H, S, D], K [B, G, K, D], V [B, G, K, E], Out [B, H, S, E], any strides; Lse and Rest
    [B, H, S] float32, contiguous: see `finished`. Mean [B, G, 1, E] is read where
    EMPTY is "uniform".
    """
    blocks = tl.cdiv(rows, BLOCK_M)
    z, place = place_of(blocks, together, tl.minimum(ahead, blocks))
    b = z // heads
    h = z % heads
    g = h // GROUP
    m = row_in_order(table, table_strides, b, h, place, blocks, room, RANGES, True)
    start = m * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    inside = tl.minimum(row, rows - 1 - start)  # what lies beyond the last query is not stored
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    q = load_tile(row_of(Q, q_strides, b, h, start), inside, q_strides[2], d, q_strides[3],
                  D, BLOCK_D)  # fmt: skip
    K = head_of(K, k_strides, b, g)
    V = head_of(V, v_strides, b, g)
    i = (start + inside)[:, None]
    seed = tl.load(Seed) if drop is not None else 0
    acc, total, top = nothing_seen(BLOCK_M, BLOCK_E)
    visited, partial, full = table_row(table, table_strides, b, h, m, RANGES)
    acc, total, top = _attend(
        acc, total, top, q, K, V, k_strides, v_strides, b, h, i, start + inside,
        start, row[:, None], operands, strides, numbers, seed, visited, full, room, columns,
        score, lift, FACTOR, keep, drop,
        D, E, BLOCK_D, BLOCK_E, BLOCK_N, RANGES, False, PLANES, PRECISION,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, K, V, k_strides, v_strides, b, h, i, start + inside,
        start, row[:, None], operands, strides, numbers, seed, visited, partial, room, columns,
        score, lift, FACTOR, keep, drop,
        D, E, BLOCK_D, BLOCK_E, BLOCK_N, RANGES, True, PLANES, PRECISION,
    )  # fmt: skip
    mean = 0.0
    if EMPTY == "uniform":
        mean = tl.load(
            head_of(Mean, mean_strides, b, g) + e * mean_strides[3], mask=e < E, other=0.0
        ).to(tl.float32)[None, :]
    acc, lse, rest = finished(acc, total, top, mean, KEPT, EMPTY, PLANES)
    line = z.to(tl.int64) * rows + start + row
    if PLANES == 2:
        tl.store(Rest + line, rest, mask=start + row < rows)
    if PLANES > 0:
        tl.store(Lse + line, lse, mask=start + row < rows)
    Out = row_of(Out, out_strides, b, h, start)
    store_tile(Out, row, out_strides[2], e, out_strides[3], acc, rows - start, E, BLOCK_E)
