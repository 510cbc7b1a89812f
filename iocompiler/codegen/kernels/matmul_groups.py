"""Several products of one inner extent in one launch, each with an epilogue of its own.

    sums_i[m, n] = sum_k lefts[i][m, k] rights[i][k, n]        in float32
    epilogue(i, sums_i) stores what is made of them

The layers that read one input (query, key and value), and their weights' gradients: apart each may
leave most of a device idle in its last wave of tiles. Tiles are numbered through, those of the
first product first. Operands are brought as in ``matmul.py`` and ``matmul_descriptors.py``; in the
latter's way each tile takes the descriptors of its product, in one loop for all.
"""

import triton
import triton.language as tl

from iocompiler.codegen.kernels.matmul import finish, tile_place, tile_sums
from iocompiler.codegen.kernels.matmul_descriptors import load_block, operand_descriptor


@triton.jit
def one_tile_of_group(
    number, Lefts, Rights, Ms, Ns, K, left_strides, right_strides, operands, epilogue: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, MEMBERS: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """A tile from its number."""
    begin = 0
    for i in tl.static_range(MEMBERS):
        rows, columns = tl.cdiv(Ms[i], BLOCK_M), tl.cdiv(Ns[i], BLOCK_N)
        end = begin + rows * columns
        if (number >= begin) & (number < end):
            m, n = tile_place(number - begin, rows, columns, GROUP)
            sums, _ = tile_sums(
                tl.zeros((BLOCK_M, BLOCK_N), tl.float32), Lefts[i], Rights[i], None,
                m, n, Ms[i], Ns[i], K, left_strides[i], right_strides[i], (0, 0, 0),
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_M, EVEN_N, EVEN_K,
            )  # fmt: skip
            finish(
                sums, sums, i, m, n * BLOCK_N, operands, epilogue, BLOCK_M, BLOCK_N, PARTS, False
            )
        begin = end


@triton.jit
def matmul_groups(
    Lefts, Rights, Ms, Ns, K, left_strides, right_strides, operands, epilogue: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, MEMBERS: tl.constexpr, WALK: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """MEMBERS products of Lefts[i] [Ms[i], K] and Rights[i] [K, Ns[i]], any strides. Tuples have
    one item a product, all else is as in `matmul`; the epilogue is given the product's number in
    place of that in a batch. EVEN_M, EVEN_N: of every product.
    """
    if WALK:
        tiles = 0
        for i in tl.static_range(MEMBERS):
            tiles += tl.cdiv(Ms[i], BLOCK_M) * tl.cdiv(Ns[i], BLOCK_N)
        for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
            one_tile_of_group(
                number, Lefts, Rights, Ms, Ns, K, left_strides, right_strides, operands, epilogue,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP, PARTS, MEMBERS, EVEN_M, EVEN_N, EVEN_K,
            )  # fmt: skip
    else:
        one_tile_of_group(
            tl.program_id(0), Lefts, Rights, Ms, Ns, K, left_strides, right_strides,
            operands, epilogue,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP, PARTS, MEMBERS, EVEN_M, EVEN_N, EVEN_K,
        )  # fmt: skip


@triton.jit
def matmul_groups_descriptors(
    Lefts, Rights, Ms, Ns, K, left_strides, right_strides, operands, epilogue: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, MEMBERS: tl.constexpr,
    LEFT_IN_ROWS: tl.constexpr, RIGHT_IN_ROWS: tl.constexpr,
):  # fmt: skip
    """MEMBERS products of Lefts[i] [Ms[i], K] and Rights[i] [K, Ns[i]], which lie as operands of
    `matmul_descriptors` do, all left ones alike, and all right ones.
    """
    lefts, rights, tiles = (), (), 0
    for i in tl.static_range(MEMBERS):
        left = operand_descriptor(
            Lefts[i], Ms[i], K, left_strides[i][0], left_strides[i][1],
            BLOCK_M, BLOCK_K, LEFT_IN_ROWS,
        )  # fmt: skip
        right = operand_descriptor(
            Rights[i], Ns[i], K, right_strides[i][1], right_strides[i][0],
            BLOCK_N, BLOCK_K, RIGHT_IN_ROWS,
        )  # fmt: skip
        lefts, rights = lefts + (left,), rights + (right,)
        tiles += tl.cdiv(Ms[i], BLOCK_M) * tl.cdiv(Ns[i], BLOCK_N)
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        # branches around the inner loop would keep it from becoming one with this
        member, begin, end = 0, 0, 0
        rows, columns = tl.cdiv(Ms[0], BLOCK_M), tl.cdiv(Ns[0], BLOCK_N)
        for i in tl.static_range(1, MEMBERS):
            end += tl.cdiv(Ms[i - 1], BLOCK_M) * tl.cdiv(Ns[i - 1], BLOCK_N)
            behind = number >= end
            member, begin = tl.where(behind, i, member), tl.where(behind, end, begin)
            rows = tl.where(behind, tl.cdiv(Ms[i], BLOCK_M), rows)
            columns = tl.where(behind, tl.cdiv(Ns[i], BLOCK_N), columns)
        m, n = tile_place(number - begin, rows, columns, GROUP)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            left, right = lefts[0], rights[0]
            for i in tl.static_range(1, MEMBERS):
                if member >= i:
                    left, right = lefts[i], rights[i]
            a = load_block(left, m * BLOCK_M, step * BLOCK_K, LEFT_IN_ROWS)
            b = load_block(right, n * BLOCK_N, step * BLOCK_K, RIGHT_IN_ROWS)
            sums = tl.dot(a, b.T, sums, input_precision="ieee")
        finish(
            sums, sums, member, m, n * BLOCK_N, operands, epilogue,
            BLOCK_M, BLOCK_N, PARTS, False,
        )  # fmt: skip
