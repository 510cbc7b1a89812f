"""Products of several pairs of matrices, in one sum, with an epilogue.

    sums[b, m, n] = sum_i sum_k lefts[i][b, m, k] rights[i][b, k, n]        in float32

The gradient of what several linear layers read: dq wq + dk wk + dv wv. Operands are brought as in
``matmul.py`` and ``matmul_descriptors.py``. In the latter's way the pairs lie one behind the other
along one inner extent, and each step takes the descriptors of its pair: one loop for all, so the
loads of the next pair are on their way before the last one is done, and the next tile's before
this one is stored.
"""

import triton
import triton.language as tl

from iocompiler.codegen.kernels.matmul import finish, tile_place, tile_sums
from iocompiler.codegen.kernels.matmul_descriptors import load_block, operand_descriptor


@triton.jit
def one_summed_tile(
    number, Lefts, Rights, M, N, Ks, left_strides, right_strides,
    operands, epilogue: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, TERMS: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """A tile from its number: the batch's first, then along rows and columns."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    b = number // (rows * columns)
    m, n = tile_place(number % (rows * columns), rows, columns, GROUP)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(TERMS):
        sums, _ = tile_sums(
            sums, Lefts[i] + b.to(tl.int64) * left_strides[i][2],
            Rights[i] + b.to(tl.int64) * right_strides[i][2], None,
            m, n, M, N, Ks[i], left_strides[i], right_strides[i], (0, 0, 0),
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_M, EVEN_N, EVEN_K,
        )  # fmt: skip
    finish(sums, sums, b, m, n * BLOCK_N, operands, epilogue, BLOCK_M, BLOCK_N, PARTS, False)


@triton.jit
def matmul_sums(
    Lefts, Rights, batch, M, N, Ks, left_strides, right_strides,
    operands, epilogue: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, TERMS: tl.constexpr, WALK: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Sums of TERMS products of Lefts[i] [batch, M, Ks[i]] and Rights[i] [batch, Ks[i], N], any
    strides. Tuples have one item a product, all else is as in `matmul`; EVEN_K: of every one.
    """
    if WALK:
        tiles = batch * tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
            one_summed_tile(
                number, Lefts, Rights, M, N, Ks, left_strides, right_strides, operands, epilogue,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP, PARTS, TERMS, EVEN_M, EVEN_N, EVEN_K,
            )  # fmt: skip
    else:
        one_summed_tile(
            tl.program_id(0), Lefts, Rights, M, N, Ks, left_strides, right_strides,
            operands, epilogue,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP, PARTS, TERMS, EVEN_M, EVEN_N, EVEN_K,
        )  # fmt: skip


@triton.jit
def matmul_sums_descriptors(
    Lefts, Rights, M, N, Ks, left_strides, right_strides, operands, epilogue: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, TERMS: tl.constexpr,
    LEFT_IN_ROWS: tl.constexpr, RIGHT_IN_ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of TERMS products of Lefts[i] [M, Ks[i]] and Rights[i] [Ks[i], N], which lie as
    operands of `matmul_descriptors` do, all left ones alike, and all right ones.
    """
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    lefts, rights, steps = (), (), 0
    for i in tl.static_range(TERMS):
        left = operand_descriptor(
            Lefts[i], M, Ks[i], left_strides[i][0], left_strides[i][1],
            BLOCK_M, BLOCK_K, LEFT_IN_ROWS,
        )  # fmt: skip
        right = operand_descriptor(
            Rights[i], N, Ks[i], right_strides[i][1], right_strides[i][0],
            BLOCK_N, BLOCK_K, RIGHT_IN_ROWS,
        )  # fmt: skip
        lefts, rights = lefts + (left,), rights + (right,)
        steps += tl.cdiv(Ks[i], BLOCK_K)
    for number in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), flatten=True):
        m, n = tile_place(number, rows, columns, GROUP)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            left, right, begin, end = lefts[0], rights[0], 0, 0
            for i in tl.static_range(1, TERMS):
                end += tl.cdiv(Ks[i - 1], BLOCK_K)
                if step >= end:
                    left, right, begin = lefts[i], rights[i], end
            k = (step - begin) * BLOCK_K
            a = load_block(left, m * BLOCK_M, k, LEFT_IN_ROWS)
            b = load_block(right, n * BLOCK_N, k, RIGHT_IN_ROWS)
            sums = tl.dot(a, b.T, sums, input_precision="ieee")
        finish(sums, sums, 0, m, n * BLOCK_N, operands, epilogue, BLOCK_M, BLOCK_N, PARTS, False)
