"""The parts of the row kernel of linear + cross-entropy: blocks read, summed, differentiated."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
_ASSEMBLES = tl.constexpr(not triton.knobs.runtime.interpret)  # which the interpreter does not


@triton.jit
def read(there, some, POLICY: tl.constexpr):
    """What lies ``there``, where ``some`` (None: everywhere)."""
    if some is None:
        stored = tl.load(there, eviction_policy=POLICY)
    else:
        stored = tl.load(there, mask=some, other=0, eviction_policy=POLICY)
    return stored


@triton.jit
def read_blocks(start, at, COUNT: tl.constexpr, BLOCK: tl.constexpr, POLICY: tl.constexpr):
    """So many whole blocks that follow each other: all of their loads are on their way at once."""
    blocks = ()
    for index in tl.static_range(COUNT):
        block = read(start + (index * BLOCK + at), None, POLICY)
        blocks = blocks + (block,)
    return blocks


@triton.jit
def again(stored):
    """The same. Where the compiler sees that, it keeps what is held between the passes as it is
    converted in the first: in twice the registers.
    """
    if _ASSEMBLES and stored.dtype.primitive_bitwidth <= 32:
        packed: tl.constexpr = 32 // stored.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [stored], stored.dtype, is_pure=False, pack=packed
        )
    return stored


@triton.jit
def bounded(stored, rate, CAPPED: tl.constexpr, NEGATED: tl.constexpr):
    """t of `cross_entropy_rows`, where tanh(inner * y) = 2 / (1 + exp2(rate * y)) - 1."""
    t = stored.to(tl.float32)
    if CAPPED:
        t = 2 / (1 + tl.exp2(t * rate)) - 1
    return -t if NEGATED else t


@triton.jit
def add_block(
    sums, stored, live, rate, scale, CAPPED: tl.constexpr, NEGATED: tl.constexpr,
    SMOOTHED: tl.constexpr,
):  # fmt: skip
    """(greatest t, sum of exp2(scale * (t - greatest)), sum of t) with a block more; its elements
    count where ``live`` (None: everywhere).
    """
    greatest, total, summed = sums
    t = bounded(stored, rate, CAPPED, NEGATED)
    if SMOOTHED:
        summed += tl.sum(t if live is None else tl.where(live, t, 0.0), 1)
    new = tl.maximum(greatest, tl.max(t if live is None else tl.where(live, t, LOWEST), 1))
    terms = tl.exp2((t - new[:, None]) * scale)
    if live is not None:
        terms = tl.where(live, terms, 0.0)
    total = total * tl.exp2((greatest - new) * scale) + tl.sum(terms, 1)
    return new, total, summed


@triton.jit
def slopes(
    stored, top, scale, factor, taken, rate, CAPPED: tl.constexpr, NEGATED: tl.constexpr
):  # fmt: skip
    """d loss / d y, where ``taken`` is subtracted from ``factor`` times the exponentials."""
    t = bounded(stored, rate, CAPPED, NEGATED)
    d = tl.exp2((t - top) * scale) * factor - taken
    return d * (1 - t * t) if CAPPED else d
