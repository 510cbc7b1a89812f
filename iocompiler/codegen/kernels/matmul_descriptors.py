"""Matrix products with an epilogue, whose operands the copy engine of Hopper brings (TMA).

What is computed is as in ``matmul.py``. Programs walk the tiles; the loop over tiles and that over
the inner extent are one (``flatten``), so the first operands of a tile are on their way while the
epilogue of the last one runs. Of two products that would be slower: with two sums in such a loop
the assembler does one matrix instruction at a time. ``warp_specialize`` changes nothing for sm_90
in Triton 3.6.
"""

import triton
import triton.language as tl

from iocompiler.codegen.kernels.matmul import finish, tile_place


@triton.jit
def operand_descriptor(
    Pointer, lines, K, along_lines, along_k,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, IN_ROWS: tl.constexpr,
):  # fmt: skip
    """Of an operand of ``lines`` x K; IN_ROWS: K runs along memory."""
    if IN_ROWS:
        return tl.make_tensor_descriptor(Pointer, [lines, K], [along_lines, 1], [BLOCK, BLOCK_K])
    else:
        return tl.make_tensor_descriptor(Pointer, [K, lines], [along_k, 1], [BLOCK_K, BLOCK])


@triton.jit
def load_block(descriptor, line, k, IN_ROWS: tl.constexpr):
    """Lines by K; zero beyond the operand."""
    if IN_ROWS:
        return descriptor.load([line, k])
    else:
        return descriptor.load([k, line]).T


@triton.jit
def matmul_descriptors(
    Left, Right, Second, M, N, K, left_strides, right_strides, second_strides,
    operands, epilogue: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    LEFT_IN_ROWS: tl.constexpr, RIGHT_IN_ROWS: tl.constexpr, SECOND_IN_ROWS: tl.constexpr,
):  # fmt: skip
    """Products of Left [M, K] and Right, Second [K, N]; parameters as of `matmul`.

    Every operand starts at a multiple of 16 bytes, and has one stride of 1 and one that is a
    multiple of 16 bytes; of the left one K runs along memory if LEFT_IN_ROWS, of the right ones,
    seen as N x K, likewise.
    """
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    left = operand_descriptor(
        Left, M, K, left_strides[0], left_strides[1], BLOCK_M, BLOCK_K, LEFT_IN_ROWS
    )
    right = operand_descriptor(
        Right, N, K, right_strides[1], right_strides[0], BLOCK_N, BLOCK_K, RIGHT_IN_ROWS
    )
    if Second is not None:
        second = operand_descriptor(
            Second, N, K, second_strides[1], second_strides[0], BLOCK_N, BLOCK_K, SECOND_IN_ROWS
        )
    ONE: tl.constexpr = Second is None
    for number in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), flatten=ONE):
        m, n = tile_place(number, rows, columns, GROUP)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        others = sums
        for step in range(tl.cdiv(K, BLOCK_K)):
            k = step * BLOCK_K
            a = load_block(left, m * BLOCK_M, k, LEFT_IN_ROWS)
            b = load_block(right, n * BLOCK_N, k, RIGHT_IN_ROWS)
            sums = tl.dot(a, b.T, sums, input_precision="ieee")
            if Second is not None:
                c = load_block(second, n * BLOCK_N, k, SECOND_IN_ROWS)
                others = tl.dot(a, c.T, others, input_precision="ieee")
        finish(
            sums, others, 0, m, n * BLOCK_N, operands, epilogue,
            BLOCK_M, BLOCK_N, PARTS, Second is not None,
        )  # fmt: skip
