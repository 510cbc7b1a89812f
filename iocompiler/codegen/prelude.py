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
def _tanh(x):
    """1 - 2 / (exp 2|x| + 1) with the sign of x; an odd polynomial where that would cancel."""
    distance = tl.abs(x)
    above = tl.exp2(distance * 2.8853900817779268) + 1.0
    far = 1.0 - 2.0 * tl.rsqrt(above * above)
    square = x * x
    series = -0.005704042501747608 * square + 0.020637862384319305
    series = (series * square + -0.05373915657401085) * square + 0.133314311504364
    series = (series * square + -0.3333328068256378) * square
    return tl.where(distance < 0.6, x + x * series, tl.where(x < 0, -far, far))


@triton.jit
def _normal_cdf(x):
    """Phi(x) = erfc(-x / sqrt 2) / 2 by Abramowitz and Stegun 7.1.26: within 8e-8 of it."""
    distance = tl.abs(x)
    bound = 1.0 + 0.23164188943 * distance
    t = tl.rsqrt(bound * bound)  # 1 / bound, in one step
    series = 1.061405429 * t - 1.453152027
    series = (series * t + 1.421413741) * t - 0.284496736
    series = (series * t + 0.254829592) * t
    tail = 0.5 * series * tl.exp2(x * x * -0.7213475204444817)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def _normal_pdf(x):
    """phi(x) = exp(-x^2 / 2) / sqrt(2 pi), by the power that `_normal_cdf` takes."""
    return 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)


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
def _uniform(seed, counter):
    """Random numbers at each counter: float32 in [0, 1)."""
    # a block of two words serves two counters: computed once where a thread holds both
    odd = (counter & 1) != 0
    counter = counter >> 1
    low = counter.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    if counter.dtype.primitive_bitwidth == 64:
        high = high ^ (counter >> 32).to(tl.uint32)
    low, high = _philox(seed.to(tl.uint32), low, high)
    return (tl.where(odd, high, low) >> 8).to(tl.float32) * 5.9604644775390625e-08
'''
