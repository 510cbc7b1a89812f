"""The row kernel of linear + cross-entropy: losses, gradients, and the logits where they belong."""

import triton
import triton.language as tl


@triton.jit
def _scaled_logits(logits, outer, inner, CAPPED: tl.constexpr):
    """(z, dz / dlogits) of `cross_entropy_rows`."""
    slope = outer
    if CAPPED:
        bounded = 2 * tl.sigmoid(2 * inner * logits) - 1
        slope = outer * inner * (1 - bounded * bounded)
        z = outer * bounded
    else:
        z = outer * logits
    return z, slope


@triton.jit
def _read(logits, bias, at, some, BIAS: tl.constexpr, POLICY: tl.constexpr):
    """A row's logits, in their own precision."""
    stored = tl.load(logits + at, mask=some, other=0.0, eviction_policy=POLICY)
    if BIAS:
        added = tl.load(bias + at, mask=some, other=0.0).to(tl.float32)
        stored = (stored.to(tl.float32) + added).to(stored.dtype)
    return stored


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_rows(
    logits,
    gradient,
    copy,
    bias,
    target,
    coefficient,
    squared,
    loss,
    vocabulary,
    width,
    row_stride,
    gradient_stride,
    copy_stride,
    ignore_index,
    smoothing,
    outer,
    inner,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    GRADIENT: tl.constexpr,
    COPY: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program a row of ``logits`` [rows, vocabulary]; arithmetic in float32.

        y     = logits (+ bias, BIAS), rounded to their precision
        z     = outer * tanh(inner * y)          (CAPPED), else outer * y
        lse   = log sum_j exp(z_j)               (online: one pass)
        cross = lse - (1 - smoothing) * z[target] - smoothing * mean_j z_j
        loss  = c * cross + s * lse^2            (c = 1 unless SCALED, s = 0 unless SQUARED)
        d loss / d y_j = ((c + 2 s lse) * exp(z_j - lse)
                          - c * ((1 - smoothing) [j == target] + smoothing / vocabulary))
                         * dz_j / dy_j

    With GRADIENT, the last line is written to ``gradient``, which may be the logits' own memory, in
    a second pass. It begins where the first ended: more of a row is then still in L2. With COPY, y
    is written to ``copy`` in the first. A row whose target is ``ignore_index`` has c = 0; a target
    out of range has NaN for both (eager stops the device with an assertion). What is multiplied by
    0 is 0.

    Rows of ``logits`` and ``gradient``, and ``bias``, begin at multiples of WIDE elements and are
    read and written up to one; those of ``copy`` lie anywhere. The gradient is ``width`` wide, with
    zeros behind the vocabulary.
    """
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * tl.multiple_of(row_stride, WIDE)
    into = gradient + row.to(tl.int64) * tl.multiple_of(gradient_stride, WIDE)
    kept = copy + row.to(tl.int64) * copy_stride
    label = tl.load(target + row)
    ignored = label == ignore_index
    # WIDE elements side by side, of one thread
    piece = tl.arange(0, BLOCK // WIDE)[:, None] * WIDE
    columns = piece + tl.arange(0, WIDE)[None, :]
    if not SQUARED and not COPY:  # noqa: SIM102  # the outer one is decided while compiling
        if ignored:
            tl.store(loss + row, 0.0)
            if GRADIENT:
                zeros = tl.zeros([BLOCK // WIDE, WIDE], logits.dtype.element_ty)
                for first in range(0, width, BLOCK):
                    tl.store(into + first + columns, zeros, mask=first + piece < width)
            return
    inside = (label >= 0) & (label < vocabulary)
    # of each thread's own, merged once at the end: no reduction across threads inside the loop
    greatest = tl.full([BLOCK // WIDE], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK // WIDE], tl.float32)
    summed = tl.zeros([BLOCK // WIDE], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        at = first + columns
        some = first + piece < vocabulary
        stored = _read(start, bias, at, some, BIAS, "evict_last" if GRADIENT else "")
        if COPY:
            tl.store(kept + at, stored, mask=at < vocabulary, eviction_policy="evict_first")
        z, _ = _scaled_logits(stored.to(tl.float32), outer, inner, CAPPED)
        if SMOOTHED:
            summed += tl.sum(tl.where(at < vocabulary, z, 0.0), 1)
        z = tl.where(at < vocabulary, z, float("-inf"))
        new = tl.maximum(greatest, tl.max(z, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(greatest - base) + tl.sum(tl.exp(z - base[:, None]), 1)
        greatest = new
    top = tl.max(greatest, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    lse = base + tl.log(tl.sum(total * tl.exp(greatest - base), 0))
    chosen = _read(start, bias, label, inside, BIAS, "")
    chosen, _ = _scaled_logits(chosen.to(tl.float32), outer, inner, CAPPED)
    chosen = tl.where(inside, chosen, float("nan"))
    result = lse - (1 - smoothing) * chosen
    if SMOOTHED:
        result -= smoothing * (tl.sum(summed, 0) / vocabulary)
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
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        last = (width - 1) // BLOCK * BLOCK
        for back in range(0, width, BLOCK):
            at = last - back + columns
            stored = _read(start, bias, at, last - back + piece < vocabulary, BIAS, "evict_first")
            z, slope = _scaled_logits(stored.to(tl.float32), outer, inner, CAPPED)
            d = mass * tl.exp(z - lse) - tl.where(at == label, (1 - smoothing) * hit, 0.0)
            if SMOOTHED:
                d -= hit * (smoothing / vocabulary)
            d *= slope
            if not SQUARED:
                d = tl.where(ignored, 0.0, d)
            d = tl.where(at < vocabulary, d, 0.0).to(logits.dtype.element_ty)
            some = last - back + piece < width
            tl.store(into + at, d, mask=some, eviction_policy="evict_first")
