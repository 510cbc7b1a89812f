"""What every module with generated kernels starts with: imports and the functions kernels share."""

PRELUDE = '''\
import triton
import triton.language as tl
from triton.language.extra import libdevice

_ASSEMBLES = tl.constexpr(not triton.knobs.runtime.interpret)  # which the interpreter does not


@triton.jit
def _product(a, b):
    """a b, rounded on its own: never in a multiply-add."""
    if _ASSEMBLES:
        wide: tl.constexpr = a.dtype.primitive_bitwidth == 64
        assembly: tl.constexpr = "mul.rn.f64 $0, $1, $2;" if wide else "mul.rn.f32 $0, $1, $2;"
        operands: tl.constexpr = "=d,d,d" if wide else "=f,f,f"
        found = tl.inline_asm_elementwise(
            assembly, operands, [a, b], a.dtype, is_pure=True, pack=1
        )
    else:
        found = a * b
    return found


@triton.jit
def _quotient(x, divisor, inverse):
    """x / divisor, its inverse known, rounded to nearest (Markstein, IBM J. Res. Dev. 34, 1990) and
    with no branch; of |x| below 1e-30 within an ulp.
    """
    if _ASSEMBLES:
        guess = x * inverse
        rest = tl.fma(-guess, divisor, x)
        # an infinity and a zero, which has a sign, stay
        missed = (rest != 0.0) & (tl.abs(guess) < float("inf"))
        found = tl.where(missed, tl.fma(rest, inverse, guess), guess)
    else:
        found = tl.div_rn(x, divisor)  # the interpreter rounds twice in a multiply-add
    return found


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _rescaled(total, top, x):
    """total exp(top - t) + exp(x - t) for t = max(top, x), of which one exponent is 0."""
    above = x - tl.maximum(top, -3.4028234663852886e38)  # -inf only where x is
    shrink = tl.exp(-tl.abs(above))
    return tl.where(above > 0.0, total * shrink + 1.0, total + shrink)


@triton.jit
def _later_maximum(value, place, other, other_place):
    """Of two (value, place) pairs the larger value, NaN before all; of equals the smaller place."""
    wins = (other > value) | ((other != other) & (value == value))
    ties = (other == value) | ((other != other) & (value != value))
    wins = wins | (ties & (other_place < place))
    return tl.where(wins, other, value), tl.where(wins, other_place, place)


@triton.jit
def _later_minimum(value, place, other, other_place):
    wins = (other < value) | ((other != other) & (value == value))
    ties = (other == value) | ((other != other) & (value != value))
    wins = wins | (ties & (other_place < place))
    return tl.where(wins, other, value), tl.where(wins, other_place, place)


@triton.jit
def _inverse(x):
    """1 / x within 1 ulp, 0 of what is above 2^126: one instruction, with no case of its own for
    the rest of the denormal numbers.
    """
    if _ASSEMBLES:
        found = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        found = 1.0 / x
    return found


@triton.jit
def _range(divisor):
    """A power of two, times which a divisor is at least 1/2 and below 4 (a denormal number: below
    1), and so has an inverse: 2^-126 where it is above 2^126, infinite or NaN, 2^126 of zero.
    """
    # inverted it is 255 less itself, and 253 less itself is that of the power
    exponent = ~divisor.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.maximum(exponent - 0x01000000, 0x00800000).to(tl.float32, bitcast=True)


@triton.jit
def _coarse_sqrt(x):
    """The root within 2^-23 of it, that of denormal numbers too."""
    if _ASSEMBLES:
        found = tl.inline_asm_elementwise(
            "sqrt.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        found = tl.sqrt(x)
    return found


@triton.jit
def _power_of(exponent, high, low):
    """2^(exponent (high + low)) within 4 ulp, 0 below 2^-126: a power of a number known before, of
    which the logarithm is in two parts.
    """
    if _ASSEMBLES:
        product = exponent * high
        rest = tl.fma(exponent, low, tl.fma(exponent, high, -product))
        rest = tl.where(tl.abs(product) < 1024.0, rest, 0.0)  # of an infinity there is none
        found = tl.exp2(product) * tl.fma(rest, 0.6931471805599453, 1.0)
    else:  # the interpreter rounds twice in a multiply-add
        wide = exponent.to(tl.float64)
        rest = tl.where(tl.abs(exponent) < float("inf"), wide * low, 0.0)
        found = tl.exp2(wide * high + rest).to(tl.float32)
    return found


@triton.jit
def _power(x):
    """2^x within 2 ulp, 0 below 2^-126: one instruction, as `_inverse` is."""
    if _ASSEMBLES:
        found = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        found = tl.exp2(x)
    return found


@triton.jit
def _tanh(x):
    """1 - 2 / (exp 2|x| + 1) with the sign of x; an odd polynomial where that would cancel."""
    distance = tl.abs(x)
    far = 1.0 - 2.0 * _inverse(_power(distance * 2.8853900817779268) + 1.0)
    square = x * x
    series = -0.005704042501747608 * square + 0.020637862384319305
    series = (series * square + -0.05373915657401085) * square + 0.133314311504364
    series = (series * square + -0.3333328068256378) * square
    return tl.where(distance < 0.6, x + x * series, tl.where(x < 0, -far, far))


@triton.jit
def _normal_cdf(x):
    """Phi(x) = erfc(-x / sqrt 2) / 2 by Abramowitz and Stegun 7.1.26, within 7e-8 of it, or 3e-7
    as float32 rounds its steps.
    """
    t = _inverse(1.0 + 0.23164188943 * tl.abs(x))
    series = 0.5307027145 * t - 0.7265760135
    series = (series * t + 0.7107068705) * t - 0.142248368
    series = (series * t + 0.127414796) * t
    tail = series * _power(x * x * -0.7213475204444817)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def _normal_pdf(x):
    """phi(x) = exp(-x^2 / 2) / sqrt(2 pi), by the power that `_normal_cdf` takes."""
    return 0.3989422804014327 * _power(x * x * -0.7213475204444817)


@triton.jit
def _philox(key, low, high):
    """Philox2x32-7 (Salmon et al., SC11): the two words of each block, its key and counter words
    uint32.
    """
    for _ in tl.static_range(7):
        product = low.to(tl.uint64) * 0xD256D193  # one wide multiplication gives both halves
        low = (product >> 32).to(tl.uint32) ^ (key ^ high)
        high = product.to(tl.uint32)
        key = tl.add(key, 0x9E3779B9, sanitize_overflow=False)
    return low, high


@triton.jit
def _random_bits(seed, counter):
    """Random bits at each counter, the upper 16 of a uint32 (the lower ones are anything)."""
    # a block of two words serves four counters: computed once where a thread holds all of them
    number = counter >> 2
    high = (seed >> 32).to(tl.uint32)
    if counter.dtype.primitive_bitwidth == 64:
        high = high ^ (number >> 32).to(tl.uint32)
    low, high = _philox(seed.to(tl.uint32), number.to(tl.uint32), high)
    word = tl.where((counter & 2) != 0, high, low)
    return tl.where((counter & 1) != 0, word << 16, word)


@triton.jit
def _uniform(bits):
    """The number that stands for the upper 16 bits: float32 in (0, 1)."""
    return ((bits >> 16).to(tl.float32) + 0.5) * 1.52587890625e-05
'''
