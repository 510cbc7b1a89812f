"""The row kernel of linear + cross-entropy: losses, gradients, and the logits where they belong."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG_2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
_ASSEMBLES = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def _read(logits, bias, at, some, BIAS: tl.constexpr, POLICY: tl.constexpr):
    """Logits of a row in their own precision, where ``some`` (None: everywhere)."""
    if some is None:
        stored = tl.load(logits + at, eviction_policy=POLICY)
    else:
        stored = tl.load(logits + at, mask=some, other=0.0, eviction_policy=POLICY)
    if BIAS:
        if some is None:
            added = tl.load(bias + at)
        else:
            added = tl.load(bias + at, mask=some, other=0.0)
        stored = (stored.to(tl.float32) + added.to(tl.float32)).to(stored.dtype)
    return stored


@triton.jit
def _read_blocks(
    logits, bias, columns, COUNT: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
    POLICY: tl.constexpr,
):  # fmt: skip
    """So many whole blocks that follow each other: all of their loads are on their way at once."""
    blocks = ()
    for index in tl.static_range(COUNT):
        block = _read(logits, bias, index * BLOCK + columns, None, BIAS, POLICY)
        blocks = blocks + (block,)  # noqa: RUF005  # Triton knows no unpacking here
    return blocks


@triton.jit
def _again(stored):
    """The same. Unless this is hidden from the compiler, it converts what both passes read once, and
    keeps that: in twice the registers.
    """
    if _ASSEMBLES:
        packed: tl.constexpr = 32 // stored.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [stored], stored.dtype, is_pure=False, pack=packed
        )
    return stored


@triton.jit
def _bounded(stored, rate, CAPPED: tl.constexpr, NEGATED: tl.constexpr):
    """t of `cross_entropy_rows`, where tanh(inner * y) = 2 / (1 + exp2(rate * y)) - 1."""
    t = stored.to(tl.float32)
    if CAPPED:
        t = 2 / (1 + tl.exp2(rate * t)) - 1
    return -t if NEGATED else t


@triton.jit
def _sums(
    sums, stored, live, rate, scale, CAPPED: tl.constexpr, NEGATED: tl.constexpr,
    SMOOTHED: tl.constexpr,
):  # fmt: skip
    """(greatest t, sum of exp2(scale * (t - greatest)), sum of t) with a block more; its elements
    count where ``live`` (None: everywhere).
    """
    greatest, total, summed = sums
    t = _bounded(stored, rate, CAPPED, NEGATED)
    if SMOOTHED:
        summed += tl.sum(t if live is None else tl.where(live, t, 0.0), 1)
    new = tl.maximum(greatest, tl.max(t if live is None else tl.where(live, t, _LOWEST), 1))
    terms = tl.exp2((t - new[:, None]) * scale)
    if live is not None:
        terms = tl.where(live, terms, 0.0)
    total = total * tl.exp2((greatest - new) * scale) + tl.sum(terms, 1)
    return new, total, summed


@triton.jit
def _slopes(
    stored, top, scale, factor, taken, rate, CAPPED: tl.constexpr, NEGATED: tl.constexpr
):  # fmt: skip
    """d loss / d y, where ``taken`` is subtracted from ``factor`` times the exponentials."""
    t = _bounded(stored, rate, CAPPED, NEGATED)
    d = tl.exp2((t - top) * scale) * factor - taken
    return d * (1 - t * t) if CAPPED else d


@triton.jit
def _leave_out(
    start, into, kept, bias, columns, piece, vocabulary, width,
    GRADIENT: tl.constexpr, COPY: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row that is ignored: its logits still go where they belong, its gradient is zero."""
    if COPY:
        for first in range(0, vocabulary, BLOCK):
            at = first + columns
            stored = _read(start, bias, at, first + piece < vocabulary, BIAS, "evict_first")
            tl.store(kept + at, stored, mask=at < vocabulary, eviction_policy="evict_first")
        tl.debug_barrier()
    if GRADIENT:
        zeros = tl.zeros(columns.shape, start.dtype.element_ty)
        for first in range(0, width, BLOCK):
            tl.store(into + first + columns, zeros, mask=first + piece < width)


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
    NEGATED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    GRADIENT: tl.constexpr,
    COPY: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    HELD: tl.constexpr,
    DEPTH: tl.constexpr,
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

    With t = z / |outer|, exp(z_j - max z) is exp2(log2(e) |outer| (t_j - max t)): no product can
    leave the range of float32 that a difference of logits does not. NEGATED says that outer < 0.

    With GRADIENT, the last line is written to ``gradient``, which may be the logits' own memory, in
    a second pass; at the target it is written again, so that no other element is compared with it.
    With COPY, y is written to ``copy`` in the first. A row whose target is ``ignore_index`` has
    c = 0; a target out of range has NaN for both (eager stops the device with an assertion). What
    is multiplied by 0 is 0.

    The first HELD whole blocks of a row stay in registers between the passes, and so does what is
    less than a block at its end. The whole blocks between are a multiple of DEPTH (0: there are
    none) and are read twice, DEPTH at a time. The second pass begins with them where the first
    ended: more of them is then still in L2.

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
    if not SQUARED:  # noqa: SIM102  # the outer one is decided while compiling
        if ignored:
            tl.store(loss + row, 0.0)
            _leave_out(
                start, into, kept, bias, columns, piece, vocabulary, width,
                GRADIENT, COPY, BIAS, BLOCK,
            )  # fmt: skip
            return
    inside = (label >= 0) & (label < vocabulary)
    chosen = _read(start, bias, label, inside, BIAS, "")
    scale, rate = tl.abs(outer) * _LOG2_E, inner * (-2 * _LOG2_E)
    # of each thread's own, merged once at the end: no reduction across threads inside the loop
    none = tl.zeros([BLOCK // WIDE], tl.float32)
    sums = (none + _LOWEST, none, none)
    whole = vocabulary // BLOCK * BLOCK
    end = whole + columns
    live = end < vocabulary
    rest = _read(start, bias, end, whole + piece < vocabulary, BIAS, "evict_first")
    held = _read_blocks(start, bias, columns, HELD, BLOCK, BIAS, "evict_first")
    sums = _sums(sums, rest, live, rate, scale, CAPPED, NEGATED, SMOOTHED)
    if COPY:
        tl.store(kept + end, rest, mask=live, eviction_policy="evict_first")
    for index in tl.static_range(HELD):
        sums = _sums(sums, held[index], None, rate, scale, CAPPED, NEGATED, SMOOTHED)
        if COPY:
            at = index * BLOCK + columns
            tl.store(kept + at, held[index], eviction_policy="evict_first")
    if DEPTH:
        for first in range(HELD * BLOCK, whole, DEPTH * BLOCK):
            policy: tl.constexpr = "evict_last" if GRADIENT else "evict_first"
            blocks = _read_blocks(start + first, bias + first, columns, DEPTH, BLOCK, BIAS, policy)
            for index in tl.static_range(DEPTH):
                sums = _sums(sums, blocks[index], None, rate, scale, CAPPED, NEGATED, SMOOTHED)
                if COPY:
                    at = first + index * BLOCK + columns
                    tl.store(kept + at, blocks[index], eviction_policy="evict_first")
    greatest, total, summed = sums
    top = tl.max(greatest, 0)
    total = tl.sum(total * tl.exp2((greatest - top) * scale), 0)
    lse = tl.abs(outer) * top + tl.log2(total) * _LOG_2
    z = tl.abs(outer) * _bounded(chosen, rate, CAPPED, NEGATED)
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
        dtype = logits.dtype.element_ty
        slope = outer * inner if CAPPED else outer
        factor, each = mass * slope / total, hit * slope * (smoothing / vocabulary)
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        if DEPTH:
            for back in range(HELD * BLOCK, whole, DEPTH * BLOCK):
                first = whole - DEPTH * BLOCK - (back - HELD * BLOCK)
                blocks = _read_blocks(
                    start + first, bias + first, columns, DEPTH, BLOCK, BIAS, "evict_first"
                )
                for index in tl.static_range(DEPTH):
                    d = _slopes(blocks[index], top, scale, factor, each, rate, CAPPED, NEGATED)
                    at = first + index * BLOCK + columns
                    tl.store(into + at, d.to(dtype), eviction_policy="evict_first")
        for index in tl.static_range(HELD):
            d = _slopes(_again(held[index]), top, scale, factor, each, rate, CAPPED, NEGATED)
            at = index * BLOCK + columns
            tl.store(into + at, d.to(dtype), eviction_policy="evict_first")
        d = _slopes(_again(rest), top, scale, factor, each, rate, CAPPED, NEGATED)
        d = tl.where(live, d, 0.0).to(dtype)
        tl.store(into + end, d, mask=whole + piece < width, eviction_policy="evict_first")
        for first in range(whole + BLOCK, width, BLOCK):
            tl.store(into + first + columns, tl.zeros_like(d), mask=first + piece < width)
        tl.debug_barrier()  # the target's element is overwritten
        taken = each + (1 - smoothing) * hit * slope
        d = _slopes(chosen, top, scale, factor, taken, rate, CAPPED, NEGATED)
        tl.store(into + label, d.to(dtype), mask=inside)
