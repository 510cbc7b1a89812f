"""The gradient of a tensor that a score program loads.

    dload = sum ds_ij gradient_ij        over the (b, h, i, j) that load the same element

with ds of ``attention_backward.py`` and ``gradient`` the derivative of the program by the load. One
kernel for each way in which elements are shared; each sum has one program and one order, so that
results repeat bit for bit. CLASSES says of each block of scores whether it is empty (0), partial
(1) or full (2).
"""

import triton
import triton.language as tl

from iocompiler.codegen.kernels.attention_parts import (
    load_tile,
    padded_line,
    powers,
    row_of,
    score_gradients,
)


@triton.jit
def _gradients(
    Q, K, V, Grad, Lse, Rest, Delta, Seed,
    q_strides, k_strides, v_strides, grad_strides,
    operands, strides, numbers, b, h, row_start, column_start, heads, rows, columns,
    score: tl.constexpr, lift: tl.constexpr, FACTOR: tl.constexpr, keep: tl.constexpr,
    gradient: tl.constexpr, GROUP: tl.constexpr, drop: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ds times the derivative by the load, of one tile of scores."""
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    row_inside = tl.minimum(row, rows - 1 - row_start)
    inside = tl.minimum(column, columns - 1 - column_start)
    g = h // GROUP
    q = load_tile(row_of(Q, q_strides, b, h, row_start), row_inside, q_strides[2], d,
                  q_strides[3], D, BLOCK_D)  # fmt: skip
    grad = load_tile(row_of(Grad, grad_strides, b, h, row_start), row_inside, grad_strides[2], e,
                     grad_strides[3], E, BLOCK_E)  # fmt: skip
    k = load_tile(row_of(K, k_strides, b, g, column_start), inside, k_strides[2], d,
                  k_strides[3], D, BLOCK_D)  # fmt: skip
    v = load_tile(row_of(V, v_strides, b, g, column_start), inside, v_strides[2], e,
                  v_strides[3], E, BLOCK_E)  # fmt: skip
    line = padded_line(b * heads + h, rows) + row_start + row_inside
    lse = tl.load(Lse + line)[:, None] if PLANES > 0 else 0.0
    rest = tl.load(Rest + line)[:, None] if PLANES == 2 else lse
    delta = tl.load(Delta + line)[:, None] if PLANES > 0 else 0.0
    i = (row_start + row_inside)[:, None]
    j = (column_start + inside)[None, :]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = powers(s, lse, rest, b, h, i, j, column_start, operands, strides, numbers,
               score, lift, FACTOR, PLANES)  # fmt: skip
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    if drop is not None:
        dp = dp * drop(tl.load(Seed), b, h, row_start, row[:, None], column_start, column[None, :])
    ds = score_gradients(p, dp, delta, PLANES)
    if gradient is not None:
        ds = ds * gradient(s, b, h, i, j, operands, strides, numbers)
    kept = (row_start + row < rows)[:, None] & (column_start + column < columns)[None, :]
    if keep is not None:
        kept = kept & keep(b, h, i, j, operands, strides, numbers)
    return tl.where(kept, ds, 0.0)


@triton.jit(
    do_not_specialize=["heads", "rows", "columns", "own_batch", "own_heads"],
    do_not_specialize_on_alignment=["Seed"],
)
def operand_tiles(
    Q, K, V, Grad, Lse, Rest, Delta, Seed, Classes, Result,
    q_strides, k_strides, v_strides, grad_strides, class_strides,
    operands, strides, numbers, batch, heads, rows, columns, own_batch, own_heads,
    score: tl.constexpr, lift: tl.constexpr, FACTOR: tl.constexpr, keep: tl.constexpr,
    gradient: tl.constexpr, GROUP: tl.constexpr, drop: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Elements of their own for each (i, j): Result [own_batch, own_heads, S, K], contiguous, each
    of the two either all there are or 1, and then summed over.
    """
    across = tl.cdiv(columns, BLOCK_N)
    down = tl.cdiv(rows, BLOCK_M)
    n = tl.program_id(0) % across
    m = tl.program_id(0) // across % down
    z = tl.program_id(0) // (across * down)
    own_b = z // own_heads
    own_h = z % own_heads
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step_b in range(batch // own_batch):
        for step_h in range(heads // own_heads):
            b = own_b + step_b
            h = own_h + step_h
            kind = Classes + b * class_strides[0] + h * class_strides[1] + m * class_strides[2] + n
            if tl.load(kind) > 0:
                total += _gradients(
                    Q, K, V, Grad, Lse, Rest, Delta, Seed,
                    q_strides, k_strides, v_strides, grad_strides,
                    operands, strides, numbers, b, h, m * BLOCK_M, n * BLOCK_N,
                    heads, rows, columns, score, lift, FACTOR, keep, gradient, GROUP, drop,
                    D, E, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N, PLANES, PRECISION,
                )  # fmt: skip
    i = m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = n * BLOCK_N + tl.arange(0, BLOCK_N)
    pointers = Result + (z.to(tl.int64) * rows + i[:, None]) * columns + j[None, :]
    kept = (i < rows)[:, None] & (j < columns)[None, :]
    tl.store(pointers, total.to(Result.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["heads", "rows", "columns"], do_not_specialize_on_alignment=["Seed"])
def operand_lines(
    Q, K, V, Grad, Lse, Rest, Delta, Seed, Classes, Result,
    q_strides, k_strides, v_strides, grad_strides, class_strides,
    operands, strides, numbers, heads, rows, columns,
    score: tl.constexpr, lift: tl.constexpr, FACTOR: tl.constexpr, keep: tl.constexpr,
    gradient: tl.constexpr, GROUP: tl.constexpr, drop: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLANES: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Elements shared along rows of the scores, Result [B, H, S], or (not ROWS) along columns,
    [B, H, K]; float32, contiguous.
    """
    across = tl.cdiv(columns, BLOCK_N)
    down = tl.cdiv(rows, BLOCK_M)
    blocks = down if ROWS else across
    steps = across if ROWS else down
    block = tl.program_id(0) % blocks
    z = tl.program_id(0) // blocks
    b = z // heads
    h = z % heads
    SIZE: tl.constexpr = BLOCK_M if ROWS else BLOCK_N
    total = tl.zeros((SIZE,), tl.float32)
    Classes += b * class_strides[0] + h * class_strides[1]
    for step in range(steps):
        m = block if ROWS else 0 * block + step
        n = 0 * block + step if ROWS else block
        if tl.load(Classes + m * class_strides[2] + n) > 0:
            tile = _gradients(
                Q, K, V, Grad, Lse, Rest, Delta, Seed,
                q_strides, k_strides, v_strides, grad_strides,
                operands, strides, numbers, b, h, m * BLOCK_M, n * BLOCK_N,
                heads, rows, columns, score, lift, FACTOR, keep, gradient, GROUP, drop,
                D, E, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N, PLANES, PRECISION,
            )  # fmt: skip
            total += tl.sum(tile, 1 if ROWS else 0)
    length = rows if ROWS else columns
    place = block * SIZE + tl.arange(0, SIZE)
    tl.store(Result + z.to(tl.int64) * length + place, total, mask=place < length)


@triton.jit(do_not_specialize=["heads", "rows", "columns"], do_not_specialize_on_alignment=["Seed"])
def operand_diagonals(
    Q, K, V, Grad, Lse, Rest, Delta, Seed, Classes, Result,
    q_strides, k_strides, v_strides, grad_strides, class_strides,
    operands, strides, numbers, heads, rows, columns,
    score: tl.constexpr, lift: tl.constexpr, FACTOR: tl.constexpr, keep: tl.constexpr,
    gradient: tl.constexpr, GROUP: tl.constexpr, drop: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Elements shared along diagonals, of square tiles: one program walks down a diagonal of tiles
    and finds the sums for two stretches of distances j - i.

    Result [B, H, 2, diagonals of tiles, BLOCK_N] float32: of the first BLOCK_N distances from the
    corner on, and of those below.
    """
    across = tl.cdiv(columns, BLOCK_N)
    down = tl.cdiv(rows, BLOCK_M)
    diagonals = across + down - 1
    place = tl.program_id(0) % diagonals
    z = tl.program_id(0) // diagonals
    b = z // heads
    h = z % heads
    ahead = place - (down - 1)  # blocks that keys are ahead of queries
    above = tl.zeros((BLOCK_N,), tl.float32)
    below = tl.zeros((BLOCK_N,), tl.float32)
    column = tl.arange(0, BLOCK_N)
    # row r is turned to the left by r places: distances then stand in columns
    turned = column[None, :] + tl.arange(0, BLOCK_M)[:, None]
    first = tl.maximum(0, -ahead)
    last = tl.minimum(down, across - ahead)
    Classes += b * class_strides[0] + h * class_strides[1]
    for step in range(last - first):
        m = first + step
        n = m + ahead
        if tl.load(Classes + m * class_strides[2] + n) > 0:
            tile = _gradients(
                Q, K, V, Grad, Lse, Rest, Delta, Seed,
                q_strides, k_strides, v_strides, grad_strides,
                operands, strides, numbers, b, h, m * BLOCK_M, n * BLOCK_N,
                heads, rows, columns, score, lift, FACTOR, keep, gradient, GROUP, drop,
                D, E, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N, PLANES, PRECISION,
            )  # fmt: skip
            tile = tl.gather(tile, turned % BLOCK_N, 1)
            above += tl.sum(tl.where(turned < BLOCK_N, tile, 0.0), 0)
            below += tl.sum(tl.where(turned < BLOCK_N, 0.0, tile), 0)
    line = Result + ((z.to(tl.int64) * 2) * diagonals + place) * BLOCK_N + column
    tl.store(line, above)
    tl.store(line + diagonals * BLOCK_N, below)


@triton.jit(do_not_specialize=["heads", "rows", "columns"], do_not_specialize_on_alignment=["Seed"])
def operand_parts(
    Q, K, V, Grad, Lse, Rest, Delta, Seed, Classes, Result,
    q_strides, k_strides, v_strides, grad_strides, class_strides,
    operands, strides, numbers, heads, rows, columns,
    score: tl.constexpr, lift: tl.constexpr, FACTOR: tl.constexpr, keep: tl.constexpr,
    gradient: tl.constexpr, GROUP: tl.constexpr, drop: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLANES: tl.constexpr,
    PRECISION: tl.constexpr, SPAN: tl.constexpr, REST: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Elements of their own for each i and each j // SPAN, or (REST) j % SPAN: Result
    [B, H, S, PARTS] float32, contiguous. The sums are a product with what is 1 where a column is of
    a part.
    """
    across = tl.cdiv(columns, BLOCK_N)
    down = tl.cdiv(rows, BLOCK_M)
    m = tl.program_id(0) % down
    z = tl.program_id(0) // down
    b = z // heads
    h = z % heads
    part = tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    Classes += b * class_strides[0] + h * class_strides[1] + m * class_strides[2]
    for step in range(across):
        n = 0 * m + step
        if tl.load(Classes + n) > 0:
            tile = _gradients(
                Q, K, V, Grad, Lse, Rest, Delta, Seed,
                q_strides, k_strides, v_strides, grad_strides,
                operands, strides, numbers, b, h, m * BLOCK_M, n * BLOCK_N,
                heads, rows, columns, score, lift, FACTOR, keep, gradient, GROUP, drop,
                D, E, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N, PLANES, PRECISION,
            )  # fmt: skip
            j = n * BLOCK_N + tl.arange(0, BLOCK_N)
            place = j % SPAN if REST else j // SPAN
            shares = (place[:, None] == part[None, :]).to(K.dtype.element_ty)
            total = tl.dot(tile.to(K.dtype.element_ty), shares, total, input_precision=PRECISION)
    i = m * BLOCK_M + tl.arange(0, BLOCK_M)
    pointers = Result + (z.to(tl.int64) * rows + i[:, None]) * PARTS + part[None, :]
    tl.store(pointers, total, mask=(i < rows)[:, None] & (part < PARTS)[None, :])
