"""What every module with generated kernels starts with: imports and the functions kernels share."""

PRELUDE = '''\
import triton
import triton.language as tl
from triton.language.extra import libdevice


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
def _uniform(seed, counter):
    """Philox2x32-7 (Salmon et al., SC11) at each counter: float32 in [0, 1)."""
    # a block of two words serves two counters: computed once where a thread holds both
    odd = (counter & 1) != 0
    counter = counter >> 1
    key = seed.to(tl.uint32)
    low = counter.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    if counter.dtype.primitive_bitwidth == 64:
        high = high ^ (counter >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        product = low.to(tl.uint64) * 0xD256D193  # one wide multiplication gives both halves
        low = (product >> 32).to(tl.uint32) ^ (key ^ high)
        high = product.to(tl.uint32)
        key = tl.add(key, 0x9E3779B9, sanitize_overflow=False)
    return (tl.where(odd, high, low) >> 8).to(tl.float32) * 5.9604644775390625e-08
'''
