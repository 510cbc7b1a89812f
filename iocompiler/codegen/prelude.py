"""What every module with generated kernels starts with: imports and the combine functions of reductions."""

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
    """Of two (value, place) pairs the larger value, a NaN before all, the smaller place among equals."""
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
'''
