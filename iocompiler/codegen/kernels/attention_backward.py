"""Attention with a score program, backward.

With p_ij = exp2(s_ij - lse_i) of the forward and delta_i = sum_e dout_ie out_ie - dlse_i, where
dlse_i is the gradient of the row's log-sum-exp to the base of e:

    dv_j = sum_i p_ij dout_i              ds_ij = p_ij (dout_i . v_j - delta_i)
    dk_j = scale sum_i ds_ij slope_ij q_i   dq_i = scale sum_j ds_ij slope_ij k_j

where slope is the derivative of the score program by scale * q_i . k_j. With dropout, m_ij is 1
where it leaves a probability, else 0, and what is left is multiplied by KEPT: p_ij has that factor
through its lse and delta_i is divided by it, so that

    dv_j = sum_i m_ij p_ij dout_i         ds_ij = p_ij (m_ij dout_i . v_j - delta_i)

With no softmax (no PLANES of an lse) p_ij = s_ij and ds_ij = dout_i . v_j.

Tri Dao,
"FlashAttention-2", arXiv 2307.08691, algorithm 2, with programs of their own for dq: no atomic
additions, so that results repeat bit for bit.
"""

import triton
import triton.language as tl

from iocompiler.codegen.kernels.attention_parts import (
    head_of,
    load_tile,
    padded_line,
    powers,
    row_of,
    score_gradients,
    store_sums,
    store_tile,
)
from iocompiler.codegen.kernels.attention_table import (
    in_turn,
    part_of,
    place_of,
    row_in_order,
    table_entry,
    table_row,
)


@triton.jit
def _into_queries(
    dq, q, grad, lse, rest, delta, K, V, k_strides, v_strides, b, h, i, first, row,
    operands, strides, numbers, seed, visited, count, room, columns,
    score: tl.constexpr, lift: tl.constexpr, FACTOR: tl.constexpr, keep: tl.constexpr,
    slope: tl.constexpr, SCALE: tl.constexpr, drop: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, RANGES: tl.constexpr, PARTIAL: tl.constexpr,
    PLANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    column = tl.arange(0, BLOCK_N)
    following = table_entry(visited, 0, room, RANGES, PARTIAL)
    for entry in range(count):
        block, following = in_turn(following, visited, entry, room, RANGES, PARTIAL)
        start = block * BLOCK_N
        inside = column
        if PARTIAL:
            inside = tl.minimum(column, columns - 1 - start)
        j = (start + inside)[None, :]
        k_row = K + start.to(tl.int64) * k_strides[2]
        k = load_tile(k_row, inside, k_strides[2], d, k_strides[3], D, BLOCK_D)
        v_row = V + start.to(tl.int64) * v_strides[2]
        v = load_tile(v_row, inside, v_strides[2], e, v_strides[3], E, BLOCK_E)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = powers(s, lse, rest, b, h, i, j, start, operands, strides, numbers,
                   score, lift, FACTOR, PLANES)  # fmt: skip
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if drop is not None:
            dp = dp * drop(seed, b, h, first, row, start, column[None, :])
        ds = score_gradients(p, dp, delta, PLANES)
        if slope is not None:
            ds = ds * slope(s * SCALE, b, h, i, j, operands, strides, numbers)
        if PARTIAL:
            kept = (start + column < columns)[None, :]
            if keep is not None:
                kept = kept & keep(b, h, i, j, operands, strides, numbers)
            ds = tl.where(kept, ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _query_block(
    Q, K, V, Grad, Lse, Rest, Delta, Seed, DQ, SumsQ,
    q_strides, k_strides, v_strides, grad_strides, dq_strides, sums_strides,
    operands, strides, numbers, table, table_strides, room, rows, columns, heads, b, h, g, place,
    score: tl.constexpr, lift: tl.constexpr, FACTOR: tl.constexpr, keep: tl.constexpr,
    slope: tl.constexpr, SCALE: tl.constexpr, drop: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANGES: tl.constexpr,
    PLANES: tl.constexpr, PRECISION: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """dq of the block of queries that comes at a place, and with SUMMED its sums of so many rows
    (`store_sums`); the table is the forward's kind.
    """
    m = row_in_order(table, table_strides, b, h, place, tl.cdiv(rows, BLOCK_M), room, RANGES, True)
    start = m * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    inside = tl.minimum(row, rows - 1 - start)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    q = load_tile(row_of(Q, q_strides, b, h, start), inside, q_strides[2], d, q_strides[3],
                  D, BLOCK_D)  # fmt: skip
    grad = load_tile(row_of(Grad, grad_strides, b, h, start), inside, grad_strides[2], e,
                     grad_strides[3], E, BLOCK_E)  # fmt: skip
    line = padded_line(b * heads + h, rows) + start + inside
    lse = tl.load(Lse + line)[:, None] if PLANES > 0 else 0.0
    rest = tl.load(Rest + line)[:, None] if PLANES == 2 else lse
    delta = tl.load(Delta + line)[:, None] if PLANES > 0 else 0.0
    K = head_of(K, k_strides, b, g)
    V = head_of(V, v_strides, b, g)
    i = (start + inside)[:, None]
    seed = tl.load(Seed) if drop is not None else 0
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    visited, partial, full = table_row(table, table_strides, b, h, m, RANGES)
    dq = _into_queries(
        dq, q, grad, lse, rest, delta, K, V, k_strides, v_strides, b, h, i,
        start, row[:, None], operands, strides, numbers, seed, visited, full, room, columns,
        score, lift, FACTOR, keep, slope, SCALE, drop, D, E, BLOCK_D, BLOCK_E, BLOCK_N,
        RANGES, False, PLANES, PRECISION,
    )  # fmt: skip
    dq = _into_queries(
        dq, q, grad, lse, rest, delta, K, V, k_strides, v_strides, b, h, i,
        start, row[:, None], operands, strides, numbers, seed, visited, partial, room, columns,
        score, lift, FACTOR, keep, slope, SCALE, drop, D, E, BLOCK_D, BLOCK_E, BLOCK_N,
        RANGES, True, PLANES, PRECISION,
    )  # fmt: skip
    DQ = row_of(DQ, dq_strides, b, h, start)
    store_tile(DQ, row, dq_strides[2], d, dq_strides[3], dq * SCALE, rows - start, D, BLOCK_D)
    if SUMMED > 0:
        store_sums(SumsQ, sums_strides, b, h, start, d, dq * SCALE, rows - start, BLOCK_M, D,
                   SUMMED)  # fmt: skip


@triton.jit
def _into_keys(
    dk, dv, k, v, Q, Grad, Lse, Rest, Delta, q_strides, grad_strides, b, h, j, first, column,
    operands, strides, numbers, seed, visited, count, room, rows,
    score: tl.constexpr, lift: tl.constexpr, FACTOR: tl.constexpr, keep: tl.constexpr,
    slope: tl.constexpr, SCALE: tl.constexpr, drop: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, RANGES: tl.constexpr, PARTIAL: tl.constexpr,
    PLANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles are transposed, [keys, queries], so that p and ds are left operands as they are; j is
    ``first`` plus ``column``, no more than there are.
    """
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    row = tl.arange(0, BLOCK_M)
    following = table_entry(visited, 0, room, RANGES, PARTIAL)
    for entry in range(count):
        block, following = in_turn(following, visited, entry, room, RANGES, PARTIAL)
        start = block * BLOCK_M
        inside = row
        if PARTIAL:
            inside = tl.minimum(row, rows - 1 - start)
        i = (start + inside)[None, :]
        q_row = Q + start.to(tl.int64) * q_strides[2]
        q = load_tile(q_row, inside, q_strides[2], d, q_strides[3], D, BLOCK_D)
        grad_row = Grad + start.to(tl.int64) * grad_strides[2]
        grad = load_tile(grad_row, inside, grad_strides[2], e, grad_strides[3], E, BLOCK_E)
        lse = tl.load(Lse + start + row)[None, :] if PLANES > 0 else 0.0
        rest = tl.load(Rest + start + row)[None, :] if PLANES == 2 else lse
        delta = tl.load(Delta + start + row)[None, :] if PLANES > 0 else 0.0
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = powers(s, lse, rest, b, h, i, j, start, operands, strides, numbers,
                   score, lift, FACTOR, PLANES)  # fmt: skip
        if PARTIAL and (keep is not None or PLANES == 0):
            kept = True
            if keep is not None:
                kept = keep(b, h, i, j, operands, strides, numbers)
            if PLANES == 0:  # else an lse of +inf does the same
                kept = kept & (start + row < rows)[None, :]
            p = tl.where(kept, p, 0.0)
        left = p
        if drop is not None:
            spared = drop(seed, b, h, start, row[None, :], first, column)
            left = p * spared
        dv = tl.dot(left.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        if drop is not None:
            dp = dp * spared
        ds = score_gradients(p, dp, delta, PLANES)
        if slope is not None:
            ds = ds * slope(s * SCALE, b, h, i, j, operands, strides, numbers)
            if PARTIAL and (keep is not None or PLANES == 0):
                ds = tl.where(kept, ds, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _key_block(
    Q, K, V, Grad, Lse, Rest, Delta, Seed, DK, DV, SumsK, SumsV,
    q_strides, k_strides, v_strides, grad_strides, dk_strides, dv_strides,
    sums_k_strides, sums_v_strides,
    operands, strides, numbers, table, table_strides, room, rows, columns, heads, b, g, place,
    score: tl.constexpr, lift: tl.constexpr, FACTOR: tl.constexpr, keep: tl.constexpr,
    slope: tl.constexpr, SCALE: tl.constexpr, drop: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANGES: tl.constexpr,
    PLANES: tl.constexpr, PRECISION: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """dk and dv of the block of keys that comes at a place, over all query heads of its group, and
    with SUMMED their sums of so many rows (`store_sums`); the table has a row for each block of
    keys.
    """
    n = row_in_order(table, table_strides, b, g * GROUP, place, tl.cdiv(columns, BLOCK_N), room,
                     RANGES, False)  # fmt: skip
    start = n * BLOCK_N
    column = tl.arange(0, BLOCK_N)
    inside = tl.minimum(column, columns - 1 - start)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    k = load_tile(row_of(K, k_strides, b, g, start), inside, k_strides[2], d, k_strides[3],
                  D, BLOCK_D)  # fmt: skip
    v = load_tile(row_of(V, v_strides, b, g, start), inside, v_strides[2], e, v_strides[3],
                  E, BLOCK_E)  # fmt: skip
    j = (start + inside)[:, None]
    seed = tl.load(Seed) if drop is not None else 0
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for member in range(GROUP):
        h = g * GROUP + member
        line = padded_line(b * heads + h, rows)
        queries = head_of(Q, q_strides, b, h)
        grads = head_of(Grad, grad_strides, b, h)
        visited, partial, full = table_row(table, table_strides, b, h, n, RANGES)
        dk, dv = _into_keys(
            dk, dv, k, v, queries, grads, Lse + line, Rest + line, Delta + line,
            q_strides, grad_strides, b, h, j, start, column[:, None],
            operands, strides, numbers, seed,
            visited, full, room, rows,
            score, lift, FACTOR, keep, slope, SCALE, drop,
            D, E, BLOCK_D, BLOCK_E, BLOCK_M, RANGES, False, PLANES, PRECISION,
        )  # fmt: skip
        dk, dv = _into_keys(
            dk, dv, k, v, queries, grads, Lse + line, Rest + line, Delta + line,
            q_strides, grad_strides, b, h, j, start, column[:, None],
            operands, strides, numbers, seed,
            visited, partial, room, rows,
            score, lift, FACTOR, keep, slope, SCALE, drop,
            D, E, BLOCK_D, BLOCK_E, BLOCK_M, RANGES, True, PLANES, PRECISION,
        )  # fmt: skip
    DK = row_of(DK, dk_strides, b, g, start)
    DV = row_of(DV, dv_strides, b, g, start)
    store_tile(DK, column, dk_strides[2], d, dk_strides[3], dk * SCALE, columns - start,
               D, BLOCK_D)  # fmt: skip
    store_tile(DV, column, dv_strides[2], e, dv_strides[3], dv, columns - start, E, BLOCK_E)
    if SUMMED > 0:
        store_sums(SumsK, sums_k_strides, b, g, start, d, dk * SCALE, columns - start, BLOCK_N, D,
                   SUMMED)  # fmt: skip
        store_sums(SumsV, sums_v_strides, b, g, start, e, dv, columns - start, BLOCK_N, E, SUMMED)


@triton.jit(
    do_not_specialize=["groups", "rows", "columns", "room_q", "room_k", "together", "ahead"],
    do_not_specialize_on_alignment=["Seed"],
)
def attention_backward(
    Q, K, V, Grad, Lse, Rest, Delta, Seed, DQ, DK, DV, SumsQ, SumsK, SumsV,
    q_strides, k_strides, v_strides, grad_strides, dq_strides, dk_strides, dv_strides,
    sums_q_strides, sums_k_strides, sums_v_strides,
    operands, strides, numbers, table_q, table_q_strides, table_k, table_k_strides,
    groups, rows, columns, room_q, room_k, together, ahead,
    score: tl.constexpr, lift: tl.constexpr, FACTOR: tl.constexpr, keep: tl.constexpr,
    slope: tl.constexpr, SCALE: tl.constexpr, drop: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M_Q: tl.constexpr, BLOCK_N_Q: tl.constexpr, RANGES_Q: tl.constexpr,
    BLOCK_M_K: tl.constexpr, BLOCK_N_K: tl.constexpr, RANGES_K: tl.constexpr,
    PARTS: tl.constexpr, PLANES: tl.constexpr, PRECISION: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, or dq of one of queries. Of PARTS "both", those of a group of
    heads follow each other, so that what they read is read from HBM once.
    """
    of_keys = tl.cdiv(columns, BLOCK_N_K)
    of_queries = tl.cdiv(rows, BLOCK_M_Q)
    ahead = tl.minimum(ahead, tl.minimum(of_keys, of_queries))
    if PARTS == "keys":
        z, place = place_of(of_keys, together, ahead)
    elif PARTS == "queries":
        z, place = place_of(GROUP * of_queries, together, GROUP * ahead)
    else:
        z, place = place_of(of_keys + GROUP * of_queries, together, (1 + GROUP) * ahead)
    of_key, place = part_of(place, of_keys, ahead, GROUP, PARTS)
    b = z // groups
    g = z % groups
    heads = groups * GROUP
    if PARTS == "keys" or (PARTS == "both" and of_key):
        _key_block(
            Q, K, V, Grad, Lse, Rest, Delta, Seed, DK, DV, SumsK, SumsV,
            q_strides, k_strides, v_strides, grad_strides, dk_strides, dv_strides,
            sums_k_strides, sums_v_strides,
            operands, strides, numbers, table_k, table_k_strides, room_k, rows, columns, heads,
            b, g, place, score, lift, FACTOR, keep, slope, SCALE, drop, GROUP,
            D, E, BLOCK_D, BLOCK_E, BLOCK_M_K, BLOCK_N_K, RANGES_K, PLANES, PRECISION, SUMMED,
        )  # fmt: skip
    if PARTS == "queries" or (PARTS == "both" and not of_key):
        h = g * GROUP + place % GROUP
        _query_block(
            Q, K, V, Grad, Lse, Rest, Delta, Seed, DQ, SumsQ,
            q_strides, k_strides, v_strides, grad_strides, dq_strides, sums_q_strides,
            operands, strides, numbers, table_q, table_q_strides, room_q, rows, columns, heads,
            b, h, g, place // GROUP,
            score, lift, FACTOR, keep, slope, SCALE, drop,
            D, E, BLOCK_D, BLOCK_E, BLOCK_M_Q, BLOCK_N_Q, RANGES_Q, PLANES, PRECISION, SUMMED,
        )  # fmt: skip
