"""Matrix products with an epilogue.

    sums[b, m, n] = sum_k left[b, m, k] right[b, k, n]        in float32
    epilogue(sums) stores what is made of them

With a second right operand there are two products of one left operand, and the epilogue takes both:
act(x w) * (x v). The order of tiles is that of Triton's tutorial on matrix products (Tillet, Kung
and Cox, MAPL 2019): programs that run at once read few rows and few columns.

The reference is `runtime/reference.py`: the products by aten, the epilogue by the tile interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def tile_place(number, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles are walked column by column."""
    first = number // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = number % (GROUP * columns)
    return first + within % height, within // height


@triton.jit
def load_inside(pointers, mask, EVEN: tl.constexpr):
    """What lies outside is zero; EVEN: nothing does."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def tile_sums(
    sums, Left, Right, Second, m, n, M, N, K, left_strides, right_strides, second_strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``sums`` with those of the tile (m, n), and with those of the second product or, without one,
    as they were.
    """
    row = tl.arange(0, BLOCK_M).to(tl.int64)
    column = tl.arange(0, BLOCK_N).to(tl.int64)
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    top, first = (m * BLOCK_M).to(tl.int64), (n * BLOCK_N).to(tl.int64)
    m_inside = (row < M - top)[:, None]
    n_inside = (column < N - first)[None, :]
    left = Left + top * left_strides[0]
    left = left + row[:, None] * left_strides[0] + depth[None, :] * left_strides[1]
    right = Right + first * right_strides[1]
    right = right + depth[:, None] * right_strides[0] + column[None, :] * right_strides[1]
    others = sums
    if Second is not None:
        second = Second + first * second_strides[1]
        second = second + depth[:, None] * second_strides[0] + column[None, :] * second_strides[1]
    for _ in range(K // BLOCK_K):
        a = load_inside(left, m_inside, EVEN_M)
        b = load_inside(right, n_inside, EVEN_N)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        if Second is not None:
            c = load_inside(second, n_inside, EVEN_N)
            others = tl.dot(a, c, others, input_precision="ieee")
            second += BLOCK_K * second_strides[0]
        left += BLOCK_K * left_strides[1]
        right += BLOCK_K * right_strides[0]
    if not EVEN_K:  # apart from the loop, which needs no mask along the inner extent then
        inside = depth < K - K // BLOCK_K * BLOCK_K
        a = load_inside(left, m_inside & inside[None, :], False)
        b = load_inside(right, n_inside & inside[:, None], False)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        if Second is not None:
            c = load_inside(second, n_inside & inside[:, None], False)
            others = tl.dot(a, c, others, input_precision="ieee")
    return sums, others


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns of a tile."""
    pair = tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
    return tl.split(pair)


@triton.jit
def finish(
    sums, others, b, m, n, operands, epilogue: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """Call the epilogue on a tile, in PARTS (a power of two) side by side: what it loads then takes
    as many times less registers. ``n`` is the tile's first column.
    """
    if PARTS == 1:
        columns = (n + tl.arange(0, BLOCK_N))[None, :]
        epilogue(sums, others, b, m * BLOCK_M, columns, operands)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        sums_left, sums_right = halves(sums, BLOCK_M, BLOCK_N)
        others_left, others_right = sums_left, sums_right
        if PAIR:
            others_left, others_right = halves(others, BLOCK_M, BLOCK_N)
        finish(sums_left, others_left, b, m, n, operands, epilogue, BLOCK_M, HALF, PARTS // 2, PAIR)
        finish(
            sums_right, others_right, b, m, n + HALF, operands, epilogue,
            BLOCK_M, HALF, PARTS // 2, PAIR,
        )  # fmt: skip


@triton.jit
def one_tile(
    number, Left, Right, Second, M, N, K, left_strides, right_strides, second_strides,
    operands, epilogue: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """A tile from its number: the batch's first, then along rows and columns."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    b = number // (rows * columns)
    m, n = tile_place(number % (rows * columns), rows, columns, GROUP)
    if Second is not None:
        Second += b.to(tl.int64) * second_strides[2]
    sums, others = tile_sums(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        Left + b.to(tl.int64) * left_strides[2], Right + b.to(tl.int64) * right_strides[2], Second,
        m, n, M, N, K, left_strides, right_strides, second_strides,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_M, EVEN_N, EVEN_K,
    )  # fmt: skip
    finish(
        sums, others, b, m, n * BLOCK_N, operands, epilogue,
        BLOCK_M, BLOCK_N, PARTS, Second is not None,
    )  # fmt: skip


@triton.jit
def matmul(
    Left, Right, Second, batch, M, N, K, left_strides, right_strides, second_strides,
    operands, epilogue: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, WALK: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Products of Left [batch, M, K] and Right, Second [batch, K, N], any strides.

    Strides are (along rows, along columns, along the batch). The epilogue takes the sums of both
    products (of one, twice), the number in the batch, the first row and the columns of the tile,
    and ``operands``. EVEN_M, EVEN_N, EVEN_K: extents are multiples of the blocks. WALK: there may
    be more tiles than programs.
    """
    if WALK:
        tiles = batch * tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
            one_tile(
                number, Left, Right, Second, M, N, K,
                left_strides, right_strides, second_strides, operands, epilogue,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP, PARTS, EVEN_M, EVEN_N, EVEN_K,
            )  # fmt: skip
    else:
        one_tile(
            tl.program_id(0), Left, Right, Second, M, N, K,
            left_strides, right_strides, second_strides, operands, epilogue,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP, PARTS, EVEN_M, EVEN_N, EVEN_K,
        )  # fmt: skip
