"""What the backward of an attention needs of each row (`attention_backward.py` says what for)."""

import triton
import triton.language as tl

from iocompiler.codegen.kernels.attention_parts import load_tile, padded_line, row_of


@triton.jit(do_not_specialize=["heads", "rows"])
def attention_delta(
    Out, Grad, Lse, Rest, GradLse, PaddedLse, PaddedRest, Delta,
    out_strides, grad_strides, heads, rows,
    KEPT: tl.constexpr, LOG_KEPT: tl.constexpr, BY_LSE: tl.constexpr,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """delta_i = (sum_e dout_ie out_ie - dlse_i) / KEPT; Delta and the copies of Lse and Rest, whose
    sum is less LOG_KEPT, are float32, with lines as `padded_line` says: beyond the last row an lse
    of +inf makes probabilities 0. With two PLANES an lse may be too large for LOG_KEPT to count
    beside it. BY_LSE: GradLse is the gradient of Lse, which is to the base of 2.
    """
    blocks = tl.cdiv(rows, 128) * (128 // BLOCK_M)
    start = (tl.program_id(0) % blocks) * BLOCK_M
    z = tl.program_id(0) // blocks
    b = z // heads
    h = z % heads
    row = tl.arange(0, BLOCK_M)
    there = start + row < rows
    inside = tl.minimum(row, rows - 1 - start)  # below 0 where the whole block lies beyond
    e = tl.arange(0, BLOCK_E)
    out = load_tile(row_of(Out, out_strides, b, h, start), inside, out_strides[2], e,
                    out_strides[3], E, BLOCK_E)  # fmt: skip
    grad = load_tile(row_of(Grad, grad_strides, b, h, start), inside, grad_strides[2], e,
                     grad_strides[3], E, BLOCK_E)  # fmt: skip
    product = out.to(tl.float32) * grad.to(tl.float32)
    # a row without a score that counts may be NaN; nothing flows back through it
    product = tl.where(grad == 0.0, 0.0, product)
    given = z.to(tl.int64) * rows + start + row
    line = padded_line(z, rows) + start + row
    delta = tl.where(there, tl.sum(product, 1), 0.0)
    lse = tl.load(Lse + given, mask=there, other=float("inf"))
    if BY_LSE:
        delta -= tl.load(GradLse + given, mask=there, other=0.0) * 1.4426950408889634
    if KEPT != 1.0:
        delta = delta * (1.0 / KEPT)
        if PLANES != 2:
            lse = lse - LOG_KEPT
    tl.store(Delta + line, delta)
    tl.store(PaddedLse + line, lse)
    if PLANES == 2:
        tl.store(PaddedRest + line, tl.load(Rest + given, mask=there, other=0.0) - LOG_KEPT)
