"""The row kernel of linear + divergence: losses and gradients of two rows of logits."""

import triton
import triton.language as tl

from iocompiler.codegen.kernels.cross_entropy_parts import LOWEST, bounded

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG_2 = tl.constexpr(0.6931471805599453)
# kinds of the other row
_LOGITS = tl.constexpr(0)
_PROBABILITIES = tl.constexpr(1)


@triton.jit
def _read(start, columns, piece, vocabulary, WHOLE: tl.constexpr, POLICY: tl.constexpr):
    """The elements of a row; WHOLE: up to a multiple of what a thread reads at once."""
    some = piece < vocabulary if WHOLE else columns < vocabulary
    return tl.load(start + columns, mask=some, other=0, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def _grown(greatest, total, z):
    """(greatest z, sum of exp2(z - greatest)) with a block more; its terms, and what sums of such
    terms are to be multiplied by.
    """
    new = tl.maximum(greatest, tl.max(z, 1))
    terms, back = tl.exp2(z - new[:, None]), tl.exp2(greatest - new)
    return new, total * back + tl.sum(terms, 1), terms, back


@triton.jit
def _merged(greatest, total):
    """The same of all threads: (greatest, its sum, what a thread's sums are multiplied by)."""
    top = tl.max(greatest, 0)
    back = tl.exp2(greatest - top)
    return top, tl.sum(total * back, 0), back


@triton.jit
def _weighted(weight, mine, theirs, ENTROPY: tl.constexpr):
    """weight * (mine - theirs), or without ``mine``; nothing where there is no weight."""
    x = mine - theirs if ENTROPY else -theirs
    return tl.where(weight == 0.0, 0.0, weight * x)


@triton.jit
def _other(
    y, live, factor, rate, spread, vocabulary, KIND: tl.constexpr, CAPPED: tl.constexpr,
    SPREAD: tl.constexpr, LOGS: tl.constexpr,
):  # fmt: skip
    """(log2 p, but for a number of the row where the kind is logits; p, where it is another)."""
    if KIND == _LOGITS:
        t = tl.where(live, bounded(y, rate, CAPPED, False) * factor, float("-inf"))
        p = t
    elif KIND == _PROBABILITIES:
        p = tl.where(live, (1 - spread) * y + spread / vocabulary if SPREAD else y, 0.0)
        t = tl.log2(p) if LOGS else p
    else:
        t = tl.where(live, y * _LOG2_E, float("-inf"))
        p = tl.exp2(t)
    return t, p


@triton.jit
def divergence_rows(
    logits, other, gradient, other_gradient, target, coefficient, squared, share, loss,
    vocabulary, width, other_width,
    row_stride, other_stride, gradient_stride, other_gradient_stride,
    ignore_index, smoothing, outer, inner, scale, other_outer, other_inner, spread,
    CAPPED: tl.constexpr, OTHER_CAPPED: tl.constexpr, KIND: tl.constexpr, ENTROPY: tl.constexpr,
    REVERSED: tl.constexpr, SPREAD: tl.constexpr, HARD: tl.constexpr, SMOOTHED: tl.constexpr,
    SCALED: tl.constexpr, SQUARED: tl.constexpr, GRADIENT: tl.constexpr,
    OTHER_GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program a row of ``logits`` [rows, vocabulary] and of ``other``; arithmetic in float32.

        u     = tanh(inner * y)            (CAPPED), else y, where y are the logits
        q     = softmax(scale * u)
        p     = softmax of ``other``, scaled and capped alike (KIND 0); ``other``, or with SPREAD
                (1 - spread) * other + spread / vocabulary (1); exp(other) (2)
        D     = sum_j p_j (e log p_j - log q_j), or sum_j q_j (e log q_j - log p_j)   (REVERSED)
        loss  = share * D + c * cross_entropy(outer * u) + s * lse(outer * u)^2       (HARD)
        dD / d (scale * u_j) = (sum p) q_j - p_j, or q_j (e log q_j - log p_j - D)    (REVERSED)
        dD / d (log p_j's logit) = p_j (e log p_j - log q_j - D), or p_j - q_j        (REVERSED)

    where e = 1 (ENTROPY) or 0, and c and s are as in `cross_entropy_rows`. One pass over both rows
    finds all sums, online; the gradients are a second, which writes them over the logits. What has
    no weight adds 0; a row of which nothing counts is not read.

    Rows of ``logits`` begin at multiples of 16 bytes and are read up to a multiple of WIDE
    elements; so are those of ``other`` where ALIGNED, else they lie anywhere. Gradients are
    ``width`` and ``other_width`` wide, with zeros behind the vocabulary.
    """
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * tl.multiple_of(row_stride, WIDE)
    beside = other + row.to(tl.int64) * other_stride
    into = gradient + row.to(tl.int64) * tl.multiple_of(gradient_stride, WIDE)
    other_into = other_gradient + row.to(tl.int64) * other_gradient_stride
    if ALIGNED:
        beside = other + row.to(tl.int64) * tl.multiple_of(other_stride, WIDE)
        other_into = other_gradient + row.to(tl.int64) * tl.multiple_of(other_gradient_stride, WIDE)
    # WIDE elements side by side, of one thread
    piece = tl.arange(0, BLOCK // WIDE)[:, None] * WIDE
    each = tl.arange(0, WIDE)[None, :]
    part = tl.load(share + row).to(tl.float32)
    mass, hit, square, label, chosen = 0.0, 0.0, 0.0, -1, 0.0
    if HARD:
        label = tl.load(target + row)
        inside = (label >= 0) & (label < vocabulary)
        hit = tl.where(inside, 1.0, float("nan"))
        if SCALED:
            hit *= tl.load(coefficient + row).to(tl.float32)
        hit = tl.where(label == ignore_index, 0.0, hit)
        mass = hit
        chosen = tl.load(start + label, mask=inside, other=0.0)
    if SQUARED:
        square = tl.load(squared + row).to(tl.float32)
    longest = tl.maximum(vocabulary, tl.maximum(width, other_width))
    if (part == 0.0) & (hit == 0.0) & (square == 0.0):
        tl.store(loss + row, 0.0)
        for first in range(0, longest, BLOCK):
            zeros = tl.zeros([BLOCK // WIDE, WIDE], tl.float32)
            columns = first + piece + each
            if GRADIENT:
                nothing = zeros.to(gradient.dtype.element_ty)
                tl.store(into + columns, nothing, mask=first + piece < width)
            if OTHER_GRADIENT:
                nothing = zeros.to(other_gradient.dtype.element_ty)
                tl.store(other_into + columns, nothing, mask=first + piece < other_width)
        return
    rate, other_rate = inner * (-2 * _LOG2_E), other_inner * (-2 * _LOG2_E)
    soft_factor, hard_factor, other_factor = scale * _LOG2_E, outer * _LOG2_E, other_outer * _LOG2_E
    LOGS: tl.constexpr = ENTROPY or REVERSED
    # of each thread's own, merged once at the end: no reduction across threads inside the loop
    none = tl.zeros([BLOCK // WIDE], tl.float32)
    soft_top, soft_total = none + LOWEST, none
    hard_top, hard_total, hard_sum = none + LOWEST, none, none
    other_top, other_total = none + LOWEST, none
    weighed = none
    for first in range(0, vocabulary, BLOCK):
        columns = first + piece + each
        live = columns < vocabulary
        y = _read(start, columns, first + piece, vocabulary, True, "evict_last")
        yt = _read(beside, columns, first + piece, vocabulary, ALIGNED, "evict_last")
        u = bounded(y, rate, CAPPED, False)
        a = tl.where(live, u * soft_factor, float("-inf"))
        t, p = _other(
            yt, live, other_factor, other_rate, spread, vocabulary, KIND, OTHER_CAPPED, SPREAD, LOGS
        )
        if HARD:
            h = tl.where(live, u * hard_factor, float("-inf"))
            hard_top, hard_total, _, _ = _grown(hard_top, hard_total, h)
            if SMOOTHED:
                hard_sum += tl.sum(tl.where(live, u, 0.0), 1)
        soft_top, soft_total, weights, back = _grown(soft_top, soft_total, a)
        if REVERSED:
            weighed = weighed * back + tl.sum(_weighted(weights, a, t, ENTROPY), 1)
        if KIND == _LOGITS:
            other_top, other_total, weights, back = _grown(other_top, other_total, t)
            if not REVERSED:
                weighed = weighed * back + tl.sum(_weighted(weights, t, a, ENTROPY), 1)
        elif not REVERSED:
            other_total += tl.sum(p, 1)
            weighed += tl.sum(_weighted(p, t, a, ENTROPY), 1)
    top, total, back = _merged(soft_top, soft_total)
    soft_lse = top + tl.log2(total)
    other_lse, whole = 0.0, 1.0
    if REVERSED:
        divergence = tl.sum(weighed * back, 0) / total
    if KIND == _LOGITS:
        other_top, other_total, back = _merged(other_top, other_total)
        other_lse = other_top + tl.log2(other_total)
        if not REVERSED:
            divergence = tl.sum(weighed * back, 0) / other_total
    elif not REVERSED:
        whole = tl.sum(other_total, 0)
        divergence = tl.sum(weighed, 0)
    if REVERSED:
        divergence += other_lse - soft_lse if ENTROPY else other_lse
    else:
        divergence += whole * soft_lse
        divergence -= other_lse if ENTROPY else 0.0
    divergence *= _LOG_2
    result = tl.where(part == 0.0, 0.0, part * divergence)
    hard_lse = 0.0
    if HARD:
        top, total, _ = _merged(hard_top, hard_total)
        hard_lse = top + tl.log2(total)
        lse = hard_lse * _LOG_2
        z = outer * bounded(chosen, rate, CAPPED, False)
        cross = lse - (1 - smoothing) * z
        if SMOOTHED:
            cross -= smoothing * (outer * tl.sum(hard_sum, 0) / vocabulary)
        result += tl.where(hit == 0.0, 0.0, hit * cross)
        if SQUARED:
            result += tl.where(square == 0.0, 0.0, square * lse * lse)
            mass += tl.where(square == 0.0, 0.0, 2 * square * lse)
    tl.store(loss + row, result)
    if GRADIENT or OTHER_GRADIENT:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        soft_share, other_share = part * scale, part * other_outer
        mass, spread_out, taken = mass * outer, 0.0, hit * outer * (1 - smoothing)
        if SMOOTHED:
            spread_out = hit * outer * (smoothing / vocabulary)
        for first in range(0, longest, BLOCK):
            columns = first + piece + each
            live = columns < vocabulary
            y = _read(start, columns, first + piece, vocabulary, True, "evict_first")
            yt = _read(beside, columns, first + piece, vocabulary, ALIGNED, "evict_first")
            u = bounded(y, rate, CAPPED, False)
            a = u * soft_factor - soft_lse
            q = tl.exp2(a)
            t, p = _other(
                yt, live, other_factor, other_rate, spread, vocabulary, KIND, OTHER_CAPPED, SPREAD,
                LOGS,
            )  # fmt: skip
            if KIND == _LOGITS:
                t -= other_lse
                p = tl.exp2(t)
            if GRADIENT:
                if REVERSED:
                    d = _weighted(q, a, t, ENTROPY) * _LOG_2 - q * divergence
                else:
                    d = whole * q - p
                d = tl.where(part == 0.0, 0.0, d * soft_share)
                if HARD:
                    hard = tl.exp2(u * hard_factor - hard_lse) * mass
                    hard -= tl.where(columns == label, taken + spread_out, spread_out)
                    d += tl.where((mass == 0.0) & (hit == 0.0), 0.0, hard)
                if CAPPED:
                    d *= inner * (1 - u * u)
                d = tl.where(live, d, 0.0).to(gradient.dtype.element_ty)
                there = first + piece < width
                tl.store(into + columns, d, mask=there, eviction_policy="evict_first")
            if OTHER_GRADIENT:
                if REVERSED:
                    d = p - q
                else:
                    d = _weighted(p, t, a, ENTROPY) * _LOG_2 - p * divergence
                d = tl.where(part == 0.0, 0.0, d * other_share)
                if OTHER_CAPPED:
                    v = bounded(yt, other_rate, OTHER_CAPPED, False)
                    d *= other_inner * (1 - v * v)
                d = tl.where(live, d, 0.0).to(other_gradient.dtype.element_ty)
                there = first + piece < other_width
                tl.store(other_into + columns, d, mask=there, eviction_policy="evict_first")
