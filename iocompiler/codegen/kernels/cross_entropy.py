"""The row kernel of linear + cross-entropy: losses, gradients, and the logits where they belong."""

import triton
import triton.language as tl

from iocompiler.codegen.kernels.cross_entropy_parts import (
    LOWEST,
    add_block,
    again,
    bounded,
    read,
    read_blocks,
    slopes,
)
from iocompiler.codegen.kernels.cross_entropy_words import (
    copy_ends,
    copy_words,
    opened,
    place_of,
    places,
    words_of,
)

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _elements(block, dtype: tl.constexpr, COPY: tl.constexpr):
    """Of a block as it is held."""
    return opened(block, dtype) if COPY else block


@triton.jit
def _leave_out(
    source, behind, cut, into, place, missing, columns, at, piece, vocabulary, width,
    GRADIENT: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A row that is ignored: its logits still go where they belong, its gradient is zero."""
    if COPY:
        for first in range(0, vocabulary, BLOCK):
            here = first // WIDE + at
            copy_words(source, behind, cut, place, missing, here, vocabulary, WIDE)
        tl.debug_barrier()
    if GRADIENT:
        zeros = tl.zeros(columns.shape, into.dtype.element_ty)
        for first in range(0, width, BLOCK):
            tl.store(into + first + columns, zeros, mask=first + piece < width)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_rows(
    logits,
    tails,
    gradient,
    copy,
    target,
    coefficient,
    squared,
    loss,
    vocabulary,
    cut,
    width,
    row_stride,
    tails_stride,
    gradient_stride,
    copy_stride,
    ignore_index,
    smoothing,
    outer,
    inner,
    CAPPED: tl.constexpr,
    NEGATED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    TAILS: tl.constexpr,
    GRADIENT: tl.constexpr,
    COPY: tl.constexpr,
    SCALED: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    HELD: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program a row of ``logits`` [rows, vocabulary]; arithmetic in float32.

        z     = outer * tanh(inner * y)          (CAPPED), else outer * y, where y are the logits
        lse   = log sum_j exp(z_j)               (online: one pass)
        cross = lse - (1 - smoothing) * z[target] - smoothing * mean_j z_j
        loss  = c * cross + s * lse^2            (c = 1 unless SCALED, s = 0 unless SQUARED)
        d loss / d y_j = ((c + 2 s lse) * exp(z_j - lse)
                          - c * ((1 - smoothing) [j == target] + smoothing / vocabulary))
                         * dz_j / dy_j

    With t = z / |outer|, exp(z_j - max z) is exp2(log2(e) |outer| (t_j - max t)): no product can
    leave the range of float32 that a difference of logits does not. NEGATED says that outer < 0.

    With GRADIENT, the last line is written to ``gradient``, which may be the logits' own memory, in
    a second pass; at the target it is written again, so that no other element is compared with it.
    With COPY, y is written to ``copy`` in the first, and rows are read in words
    (`cross_entropy_words.py`) of WIDE elements. With TAILS (and COPY, and no GRADIENT), y from
    column ``cut`` on is in ``tails``; whole blocks lie before it. A row whose target is
    ``ignore_index`` has c = 0; a target out of range has NaN for both (eager stops the device with
    an assertion). What is multiplied by 0 is 0.

    The first HELD whole blocks of a row stay in registers between the passes, and so does what is
    less than a block at its end. The whole blocks between are a multiple of DEPTH (0: there are
    none) and are read twice, DEPTH at a time. The second pass begins with them where the first
    ended: more of them is then still in L2.

    Rows of ``logits``, ``tails`` and ``gradient`` begin at multiples of 16 bytes and are read and
    written up to a multiple of WIDE elements; those of ``copy`` lie anywhere. The gradient is
    ``width`` wide, with zeros behind the vocabulary.
    """
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * tl.multiple_of(row_stride, WIDE)
    into = gradient + row.to(tl.int64) * tl.multiple_of(gradient_stride, WIDE)
    kept = copy + row.to(tl.int64) * copy_stride
    tail = tails + row.to(tl.int64) * tl.multiple_of(tails_stride, WIDE) if TAILS else None
    dtype: tl.constexpr = logits.dtype.element_ty
    label = tl.load(target + row)
    ignored = label == ignore_index
    # WIDE elements side by side, of one thread
    piece = tl.arange(0, BLOCK // WIDE)[:, None] * WIDE
    columns = piece + tl.arange(0, WIDE)[None, :]
    # how blocks are read: by elements, or by words
    UNIT: tl.constexpr = WIDE if COPY else 1
    source, at = (words_of(start), tl.arange(0, BLOCK // WIDE)) if COPY else (start, columns)
    place, missing = place_of(kept, WIDE) if COPY else (kept, 0)
    behind, edge = words_of(tail) if TAILS else None, cut // UNIT
    if not SQUARED:  # noqa: SIM102  # the outer one is decided while compiling
        if ignored:
            tl.store(loss + row, 0.0)
            if COPY:
                covered = (vocabulary + BLOCK - 1) // BLOCK * BLOCK
                copy_ends(start, tail, cut, kept, missing, vocabulary, covered, WIDE)
            _leave_out(
                source, behind, edge, into, place, missing, columns, at, piece, vocabulary, width,
                GRADIENT, COPY, BLOCK, WIDE,
            )  # fmt: skip
            return
    inside = (label >= 0) & (label < vocabulary)
    chosen = tl.load(places(start, tail, label, cut), mask=inside, other=0.0)
    scale, rate = tl.abs(outer) * _LOG2_E, inner * (-2 * _LOG2_E)
    # of each thread's own, merged once at the end: no reduction across threads inside the loop
    none = tl.zeros([BLOCK // WIDE], tl.float32)
    sums = (none + LOWEST, none, none)
    whole = vocabulary // BLOCK * BLOCK
    end = whole + columns
    live = end < vocabulary
    last = whole // UNIT + at
    # what is copied is read again from L1
    once: tl.constexpr = "" if COPY else "evict_first"
    rest = read(places(source, behind, last, edge), last * UNIT < vocabulary, once)
    held = read_blocks(source, at, HELD, BLOCK // UNIT, once)
    if COPY:
        copy_ends(start, tail, cut, kept, missing, vocabulary, whole + BLOCK, WIDE)
        copy_words(source, behind, edge, place, missing, last, vocabulary, WIDE)
    sums = add_block(
        sums, _elements(rest, dtype, COPY), live, rate, scale, CAPPED, NEGATED, SMOOTHED
    )
    for index in tl.static_range(HELD):
        if COPY:
            here = index * (BLOCK // UNIT) + at
            copy_words(source, None, 0, place, missing, here, vocabulary, WIDE)
        block = _elements(held[index], dtype, COPY)
        sums = add_block(sums, block, None, rate, scale, CAPPED, NEGATED, SMOOTHED)
    if DEPTH:
        for first in range(HELD * BLOCK, whole, DEPTH * BLOCK):
            policy: tl.constexpr = "evict_last" if GRADIENT else once
            blocks = read_blocks(source, first // UNIT + at, DEPTH, BLOCK // UNIT, policy)
            for index in tl.static_range(DEPTH):
                if COPY:
                    here = first // UNIT + index * (BLOCK // UNIT) + at
                    copy_words(source, None, 0, place, missing, here, vocabulary, WIDE)
                block = _elements(blocks[index], dtype, COPY)
                sums = add_block(sums, block, None, rate, scale, CAPPED, NEGATED, SMOOTHED)
    greatest, total, summed = sums
    top = tl.max(greatest, 0)
    total = tl.sum(total * tl.exp2((greatest - top) * scale), 0)
    lse = tl.abs(outer) * top + tl.log2(total) * _LOG_2
    z = tl.abs(outer) * bounded(chosen, rate, CAPPED, NEGATED)
    result = lse - (1 - smoothing) * tl.where(inside, z, float("nan"))
    if SMOOTHED:
        result -= smoothing * (tl.abs(outer) * tl.sum(summed, 0) / vocabulary)
    mass = tl.where(ignored, 0.0, tl.where(inside, 1.0, float("nan")))
    if SCALED:
        share = tl.load(coefficient + row).to(tl.float32)
        mass = tl.where(ignored, 0.0, mass * share)
    result = tl.where(mass == 0.0, 0.0, result * mass)
    hit = mass
    if SQUARED:
        share = tl.load(squared + row).to(tl.float32)
        result += tl.where(share == 0.0, 0.0, share * lse * lse)
        mass += tl.where(share == 0.0, 0.0, 2 * share * lse)
    tl.store(loss + row, result)
    if GRADIENT:
        slope = outer * inner if CAPPED else outer
        factor, each = mass * slope / total, hit * slope * (smoothing / vocabulary)
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        if DEPTH:
            for back in range(HELD * BLOCK, whole, DEPTH * BLOCK):
                first = whole - DEPTH * BLOCK - (back - HELD * BLOCK)
                blocks = read_blocks(
                    source, first // UNIT + at, DEPTH, BLOCK // UNIT, "evict_first"
                )
                for index in tl.static_range(DEPTH):
                    block = _elements(blocks[index], dtype, COPY)
                    d = slopes(block, top, scale, factor, each, rate, CAPPED, NEGATED)
                    there = into + first + index * BLOCK + columns
                    tl.store(there, d.to(dtype), eviction_policy="evict_first")
        for index in tl.static_range(HELD):
            block = _elements(again(held[index]), dtype, COPY)
            d = slopes(block, top, scale, factor, each, rate, CAPPED, NEGATED)
            there = into + index * BLOCK + columns
            tl.store(there, d.to(dtype), eviction_policy="evict_first")
        block = _elements(again(rest), dtype, COPY)
        d = slopes(block, top, scale, factor, each, rate, CAPPED, NEGATED)
        d = tl.where(live, d, 0.0).to(dtype)
        tl.store(into + end, d, mask=whole + piece < width, eviction_policy="evict_first")
        for first in range(whole + BLOCK, width, BLOCK):
            tl.store(into + first + columns, tl.zeros_like(d), mask=first + piece < width)
        tl.debug_barrier()  # the target's element is overwritten
        taken = each + (1 - smoothing) * hit * slope
        d = slopes(chosen, top, scale, factor, taken, rate, CAPPED, NEGATED)
        tl.store(into + label, d.to(dtype), mask=inside)
