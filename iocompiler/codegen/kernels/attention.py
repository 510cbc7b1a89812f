"""Attention with a score program, forward.

    s_ij = score(q_i . k_j, b, h, i, j)    where keep(b, h, i, j), else -inf
    out_i = sum_j softmax_j(s_ij) v_j

Tri Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 1; the softmax is Milakov and Gimelshein's
online one, arXiv 1805.02867. Scores are in units of log2(e), so that powers are of two.
"""

import triton
import triton.language as tl

from iocompiler.codegen.kernels.attention_parts import (
    head_of,
    load_tile,
    row_of,
    store_tile,
    table_entry,
    table_row,
)


@triton.jit
def _attend(
    acc, total, top, q, K, V, k_strides, v_strides, b, h, i,
    operands, strides, numbers, visited, count, room, columns,
    score: tl.constexpr, keep: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    RANGES: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the partial or the full blocks of keys of one block of queries."""
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    column = tl.arange(0, BLOCK_N)
    for entry in range(count):
        start = table_entry(visited, entry, room, RANGES, PARTIAL) * BLOCK_N
        inside = column
        if PARTIAL:
            inside = tl.minimum(column, columns - 1 - start)
        j = (start + inside)[None, :]
        k_row = K + start.to(tl.int64) * k_strides[2]
        k = load_tile(k_row, inside, k_strides[2], d, k_strides[3], D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = score(s, b, h, i, j, operands, strides, numbers)
        if PARTIAL:
            kept = (start + column < columns)[None, :]
            if keep is not None:
                kept = kept & keep(b, h, i, j, operands, strides, numbers)
            s = tl.where(kept, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # of a row of nothing but -inf so far any finite number may be taken
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - finite_top[:, None])
        shrink = tl.exp2(top - finite_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v_row = V + start.to(tl.int64) * v_strides[2]
        v = load_tile(v_row, inside, v_strides[2], e, v_strides[3], E, BLOCK_E)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["heads", "rows", "columns", "room"])
def attention_forward(
    Q, K, V, Mean, Out, Lse, Rest,
    q_strides, k_strides, v_strides, mean_strides, out_strides,
    operands, strides, numbers, table, table_strides, heads, rows, columns, room,
    score: tl.constexpr, keep: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RANGES: tl.constexpr, EMPTY: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head.

    Q [B, H, S, D], K [B, G, K, D], V [B, G, K, E], Out [B, H, S, E], any strides; Lse and Rest
    [B, H, S] float32, contiguous. Lse is log2 of the sum of the powers of two, +inf for a row with
    no score that counts; with SINKS only the largest score, and Rest is log2 of what is left. Mean
    [B, G, E] is what a row in which nothing counts becomes where EMPTY is "uniform".
    """
    blocks = tl.cdiv(rows, BLOCK_M)
    # later queries see more keys under a causal mask: they start first
    m = blocks - 1 - tl.program_id(0) % blocks
    z = tl.program_id(0) // blocks
    b = z // heads
    h = z % heads
    g = h // GROUP
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
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    visited, partial, full = table_row(table, table_strides, b, h, m, RANGES)
    acc, total, top = _attend(
        acc, total, top, q, K, V, k_strides, v_strides, b, h, i,
        operands, strides, numbers, visited, full, room, columns, score, keep,
        D, E, BLOCK_D, BLOCK_E, BLOCK_N, RANGES, False, PRECISION,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, K, V, k_strides, v_strides, b, h, i,
        operands, strides, numbers, visited, partial, room, columns, score, keep,
        D, E, BLOCK_D, BLOCK_E, BLOCK_N, RANGES, True, PRECISION,
    )  # fmt: skip
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    acc = acc / divisor[:, None]
    if EMPTY == "nan":
        acc = tl.where(empty[:, None], float("nan"), acc)
    if EMPTY == "uniform":
        mean = head_of(Mean, mean_strides, b, g) + e * mean_strides[3]
        mean = tl.load(mean, mask=e < E, other=0.0).to(tl.float32)
        acc = tl.where(empty[:, None], mean[None, :], acc)
    line = z.to(tl.int64) * rows + start + row
    rest = tl.log2(divisor)
    if SINKS:
        tl.store(Rest + line, rest, mask=start + row < rows)
        rest = tl.zeros_like(rest)
    tl.store(Lse + line, tl.where(empty, float("inf"), top + rest), mask=start + row < rows)
    Out = row_of(Out, out_strides, b, h, start)
    store_tile(Out, row, out_strides[2], e, out_strides[3], acc, rows - start, E, BLOCK_E)
