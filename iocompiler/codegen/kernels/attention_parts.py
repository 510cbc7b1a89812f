"""What the attention kernels share: one step of the online softmax, how it ends, and how they read
matrices.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(base, row, stride, column, column_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[len(row), BLOCK] of a matrix WIDTH wide, zeros beyond it."""
    pointers = base + row[:, None] * stride + column[None, :] * column_stride
    if WIDTH < BLOCK:
        tile = tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    base, row, stride, column, column_stride, tile, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the first ``rows`` rows of a tile."""
    kept = (row < rows)[:, None]
    if WIDTH < BLOCK:
        kept = kept & (column < WIDTH)[None, :]
    pointers = base + row[:, None] * stride + column[None, :] * column_stride
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=kept)


@triton.jit
def store_sums(
    base, strides, b, h, start, column, tile, rows, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Store the sum of a tile's rows, of which ``rows`` are left from ``start`` on, to [B, H, lines
    of SUMMED rows, WIDTH]: in the first of its lines, and zeros in the others.
    """
    row = tl.arange(0, ROWS)
    total = tl.sum(tl.where((row < rows)[:, None], tile, 0.0), 0)
    for line in tl.static_range(ROWS // SUMMED):
        pointers = row_of(base, strides, b, h, start // SUMMED + line) + column * strides[3]
        kept = (column < WIDTH) & (line * SUMMED < rows)
        tl.store(pointers, total if line == 0 else tl.zeros_like(total), mask=kept)


@triton.jit
def head_of(base, strides, b, h):
    """The pointer to one head of a tensor [B, H, S, D]."""
    return base + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]


@triton.jit
def row_of(base, strides, b, h, row):
    """The pointer to a row of one head."""
    return head_of(base, strides, b, h) + row.to(tl.int64) * strides[2]


@triton.jit
def padded_line(z, rows):
    """Where the rows of head ``z`` begin in what the backward keeps for each row: at a multiple of
    128, so that loads are wide and no tile of rows ends behind them.
    """
    return z.to(tl.int64) * (tl.cdiv(rows, 128) * 128)


@triton.jit
def powers(
    s, lse, rest, b, h, i, j, o, operands, strides, numbers,
    score: tl.constexpr, lift: tl.constexpr, FACTOR: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """The probabilities of dot products: of two PLANES lse is the largest score and rest log2 of
    the other factor; with none, scores are the weights.
    """
    if score is not None:
        s = score(s, b, h, i, j, o, operands, strides, numbers)
    if PLANES > 0:
        if lift is not None:
            lse = lse - lift(b, h, i, o, operands, strides, numbers)
        s = s * FACTOR - lse
        if PLANES == 2:
            s = s - rest
        s = tl.exp2(s)
    return s


@triton.jit
def score_gradients(p, dp, delta, PLANES: tl.constexpr):
    """The gradient of scores from that of their probabilities, or weights."""
    ds = dp
    if PLANES > 0:
        ds = p * (dp - delta)
    return ds


@triton.jit
def nothing_seen(BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """(acc, total, top) of an online softmax before its first block.

    The top is the lowest finite number: what is -inf then has no weight beside it, and nothing is
    subtracted from -inf.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -3.4028234663852886e38, tl.float32)
    return acc, total, top


@triton.jit
def attend(
    acc, total, top, q, K, V, k_strides, v_strides, b, h, i, h_line, i_line, first, row,
    operands, strides, numbers, seed, start, columns,
    score: tl.constexpr, lift: tl.constexpr, FACTOR: tl.constexpr, keep: tl.constexpr,
    drop: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr, PLANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax of a tile of queries taken on by one block of keys; ``h_line`` and
    ``i_line`` are h and i without the dim of the keys; ``first`` plus ``row`` is i, which may stay
    at the last row where that goes past it. With no PLANES scores are the weights.
    """
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    column = tl.arange(0, BLOCK_N)
    inside = column
    if PARTIAL:
        inside = tl.minimum(column, columns - 1 - start)
    j = (start + inside)[None, :]
    k_row = K + start.to(tl.int64) * k_strides[2]
    k = load_tile(k_row, inside, k_strides[2], d, k_strides[3], D, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if score is not None:
        s = score(s, b, h, i, j, start, operands, strides, numbers)
    if PARTIAL:
        kept = (start + column < columns)[None, :]
        if keep is not None:
            kept = kept & keep(b, h, i, j, operands, strides, numbers)
        s = tl.where(kept, s, float("-inf") if PLANES > 0 else 0.0)
    new_top = top
    if PLANES == 0:
        p = s
    elif lift is not None:
        raised = lift(b, h_line, i_line, start, operands, strides, numbers)
        new_top = tl.maximum(top, tl.max(s, 1) * FACTOR + raised)
        p = tl.exp2(s * FACTOR - (new_top - raised)[:, None])
    else:
        new_top = tl.maximum(top, tl.max(s, 1) * FACTOR)
        p = tl.exp2(s * FACTOR - new_top[:, None])
    if PLANES > 0:
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
    if drop is not None:  # what the softmax is divided by is the sum of all
        p = p * drop(seed, b, h, first, row, start, column[None, :])
    v_row = V + start.to(tl.int64) * v_strides[2]
    v = load_tile(v_row, inside, v_strides[2], e, v_strides[3], E, BLOCK_E)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def finished(
    acc, total, top, mean, KEPT: tl.constexpr, EMPTY: tl.constexpr, PLANES: tl.constexpr
):  # fmt: skip
    """(output, Lse, Rest) of a tile of queries that has seen all keys.

    Lse is log2 of the sum of the powers of two, +inf for a row with no score that counts; of two
    PLANES only the largest score, and Rest is log2 of what is left. A row in which nothing counts
    becomes NaN, zero, or (EMPTY "uniform") ``mean``, [1, E]. KEPT: 1 / (1 - p) of dropout. With no
    PLANES the sums are the output.
    """
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    acc = acc / divisor[:, None]
    if KEPT != 1.0:
        acc = acc * KEPT
    if EMPTY == "nan":
        acc = tl.where(empty[:, None], float("nan"), acc)
    if EMPTY == "uniform":
        acc = tl.where(empty[:, None], mean, acc)
    rest = tl.log2(divisor)
    lse = top
    if PLANES != 2:
        lse = top + rest
    return acc, tl.where(empty, float("inf"), lse), rest
