"""The row kernel of linear + cross-entropy: losses, and the gradient in place of the logits."""

import triton
import triton.language as tl


@triton.jit
def cross_entropy_rows(
    logits,
    target,
    coefficient,
    squared,
    loss,
    vocabulary,
    row_stride,
    ignore_index,
    smoothing,
    outer,
    inner,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    GRADIENT: tl.constexpr,
    SCALED: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row of ``logits`` [rows, vocabulary]; arithmetic in float32.

        z     = outer * tanh(inner * logits)     (CAPPED), else outer * logits
        lse   = log sum_j exp(z_j)               (online: one pass)
        cross = lse - (1 - smoothing) * z[target] - smoothing * mean_j z_j
        loss  = c * cross + s * lse^2            (c = 1 unless SCALED, s = 0 unless SQUARED)
        d loss / d logits_j = ((c + 2 s lse) * exp(z_j - lse)
                               - c * ((1 - smoothing) [j == target] + smoothing / vocabulary))
                              * dz_j / dlogits_j

    With GRADIENT, the last line overwrites the logits in a second pass, which reads the row from
    L2. A row whose target is ``ignore_index`` has c = 0; a target out of range has NaN for both
    (eager stops the device with an assertion). What is multiplied by 0 is 0.
    """
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * row_stride
    label = tl.load(target + row)
    columns = tl.arange(0, BLOCK)
    if not SQUARED:  # noqa: SIM102  # the outer one is decided while compiling
        if label == ignore_index:
            tl.store(loss + row, 0.0)
            if GRADIENT:
                zeros = tl.zeros([BLOCK], tl.float32)
                for first in range(0, vocabulary, BLOCK):
                    at = first + columns
                    tl.store(start + at, zeros.to(logits.dtype.element_ty), mask=at < vocabulary)
            return
    inside = (label >= 0) & (label < vocabulary)
    # per lane, merged once at the end: no reduction across threads inside the loop
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        at = first + columns
        z = tl.load(start + at, mask=at < vocabulary, other=0.0).to(tl.float32)
        if CAPPED:
            z = 2 * tl.sigmoid(2 * inner * z) - 1
        z = outer * z
        if SMOOTHED:
            summed += tl.where(at < vocabulary, z, 0.0)
        z = tl.where(at < vocabulary, z, float("-inf"))
        new = tl.maximum(greatest, z)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(greatest - base) + tl.exp(z - base)
        greatest = new
    top = tl.max(greatest, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    lse = base + tl.log(tl.sum(total * tl.exp(greatest - base), 0))
    chosen = tl.load(start + label, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        chosen = 2 * tl.sigmoid(2 * inner * chosen) - 1
    chosen = tl.where(inside, outer * chosen, float("nan"))
    result = lse - (1 - smoothing) * chosen
    if SMOOTHED:
        result -= smoothing * (tl.sum(summed, 0) / vocabulary)
    mass = tl.where(inside, 1.0, float("nan"))
    if SCALED:
        mass *= tl.load(coefficient + row).to(tl.float32)
        result = tl.where(mass == 0.0, 0.0, result * mass)
    hit = mass
    if SQUARED:
        mass = tl.where(label == ignore_index, 0.0, mass)
        hit = mass
        result = tl.where(label == ignore_index, 0.0, result)
        share = tl.load(squared + row).to(tl.float32)
        result += tl.where(share == 0.0, 0.0, share * lse * lse)
        mass += tl.where(share == 0.0, 0.0, 2 * share * lse)
    tl.store(loss + row, result)
    if GRADIENT:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        for first in range(0, vocabulary, BLOCK):
            at = first + columns
            z = tl.load(start + at, mask=at < vocabulary, other=0.0).to(tl.float32)
            slope = outer
            if CAPPED:
                z = 2 * tl.sigmoid(2 * inner * z) - 1
                slope = outer * inner * (1 - z * z)
            d = mass * tl.exp(outer * z - lse) - tl.where(at == label, (1 - smoothing) * hit, 0.0)
            if SMOOTHED:
                d -= hit * (smoothing / vocabulary)
            tl.store(start + at, (d * slope).to(logits.dtype.element_ty), mask=at < vocabulary)
