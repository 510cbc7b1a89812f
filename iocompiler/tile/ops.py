"""The op table: one row a scalar function, with its Triton text, its reference and its cost.

Low-precision floats are computed in float32 (`compute_dtype`); rows see float32, float64, integers
and bool.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MapRow:
    """``triton`` is a format string over the operands' texts, ``reference`` the function in torch.

    ``flops`` counts one element's work, in additions.
    """

    triton: str
    reference: Callable[..., torch.Tensor]
    flops: int = 1


@dataclass(frozen=True)
class ReduceRow:
    """``identity`` is neutral, ``reference`` the function in torch; its text is the prelude's.

    ``identity`` is "lowest" or "highest" for the ends of the dtype's range (infinities for floats).
    """

    identity: float | str
    reference: Callable[..., torch.Tensor]

    def neutral(self, dtype: torch.dtype) -> float | int | bool:
        """The neutral element in ``dtype``."""
        if not isinstance(self.identity, str):
            return bool(self.identity) if dtype == torch.bool else self.identity
        highest = self.identity == "highest"
        if dtype == torch.bool:
            return highest
        if dtype.is_floating_point:
            return float("inf") if highest else float("-inf")
        limits = torch.iinfo(dtype)
        return limits.max if highest else limits.min


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a value is held in inside a kernel: float32 for short floats, int32 for short ints."""
    if dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        return torch.float32
    if dtype in (torch.int8, torch.int16, torch.uint8):
        return torch.int32
    return dtype


def _round_to_even(x: torch.Tensor) -> torch.Tensor:
    return torch.round(x) if x.is_floating_point() else x


def _normal_pdf(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))


_LIB = "libdevice.{}({{0}})"

MAPS: dict[str, MapRow] = {
    # one operand
    "neg": MapRow("-{0}", torch.neg),
    "abs": MapRow("tl.abs({0})", torch.abs),
    "exp": MapRow("tl.exp({0})", torch.exp, 8),
    "exp2": MapRow("tl.exp2({0})", torch.exp2, 8),
    "expm1": MapRow(_LIB.format("expm1"), torch.expm1, 12),
    "log": MapRow("tl.log({0})", torch.log, 8),
    "log2": MapRow("tl.log2({0})", torch.log2, 8),
    "log10": MapRow(_LIB.format("log10"), torch.log10, 12),
    "log1p": MapRow(_LIB.format("log1p"), torch.log1p, 12),
    "sqrt": MapRow("tl.sqrt_rn({0})", torch.sqrt, 8),
    # where it is rounded to a short float (`tile/coarse.py`)
    "coarse_sqrt": MapRow("_coarse_sqrt({0})", torch.sqrt, 8),
    "rsqrt": MapRow("tl.rsqrt({0})", torch.rsqrt, 8),
    "sin": MapRow("tl.sin({0})", torch.sin, 16),
    "cos": MapRow("tl.cos({0})", torch.cos, 16),
    "tan": MapRow(_LIB.format("tan"), torch.tan, 24),
    "asin": MapRow(_LIB.format("asin"), torch.asin, 24),
    "acos": MapRow(_LIB.format("acos"), torch.acos, 24),
    "atan": MapRow(_LIB.format("atan"), torch.atan, 24),
    "sinh": MapRow(_LIB.format("sinh"), torch.sinh, 24),
    "cosh": MapRow(_LIB.format("cosh"), torch.cosh, 24),
    "tanh": MapRow("_tanh({0})", torch.tanh, 16),
    # of which nobody sees more than bfloat16 has: a score program's (`codegen/score_functions.py`)
    "coarse_tanh": MapRow("_tanh({0})", torch.tanh, 16),
    "erf": MapRow("tl.erf({0})", torch.erf, 16),
    "erfc": MapRow(_LIB.format("erfc"), torch.erfc, 16),
    "normal_cdf": MapRow("_normal_cdf({0})", torch.special.ndtr, 16),
    "normal_pdf": MapRow("_normal_pdf({0})", _normal_pdf, 10),
    "sigmoid": MapRow("tl.sigmoid({0})", torch.sigmoid, 12),
    "floor": MapRow("tl.floor({0})", torch.floor),
    "ceil": MapRow("tl.ceil({0})", torch.ceil),
    "trunc": MapRow("libdevice.trunc({0})", torch.trunc),
    "round": MapRow("libdevice.nearbyint({0})", _round_to_even),
    "isnan": MapRow("({0} != {0})", torch.isnan),
    "isinf": MapRow("(tl.abs({0}) == float('inf'))", torch.isinf),
    "logical_not": MapRow("({0} == 0)", torch.logical_not),
    "bitwise_not": MapRow("~{0}", torch.bitwise_not),
    # two operands
    "add": MapRow("{0} + {1}", torch.add),
    "sub": MapRow("{0} - {1}", torch.sub),
    "mul": MapRow("{0} * {1}", torch.mul),
    "div": MapRow("tl.div_rn({0}, {1})", torch.true_divide, 4),
    "coarse_div": MapRow("{0} / {1}", torch.true_divide, 4),  # as of "coarse_sqrt"
    "pow": MapRow("libdevice.pow({0}, {1})", torch.pow, 32),
    "fmod": MapRow("libdevice.fmod({0}, {1})", torch.fmod, 8),
    "atan2": MapRow("libdevice.atan2({0}, {1})", torch.atan2, 32),
    "copysign": MapRow("libdevice.copysign({0}, {1})", torch.copysign),
    # a division by zero is undefined even where nobody reads it: the compiler builds on its absence
    "int_trunc_div": MapRow(
        "{0} // ({1} + ({1} == 0))", lambda a, b: torch.div(a, b, rounding_mode="trunc"), 8
    ),
    "int_trunc_mod": MapRow("{0} % ({1} + ({1} == 0))", torch.fmod, 8),
    "maximum": MapRow("tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)", torch.maximum),
    "minimum": MapRow("tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)", torch.minimum),
    "eq": MapRow("({0} == {1})", torch.eq),
    "ne": MapRow("({0} != {1})", torch.ne),
    "lt": MapRow("({0} < {1})", torch.lt),
    "le": MapRow("({0} <= {1})", torch.le),
    "gt": MapRow("({0} > {1})", torch.gt),
    "ge": MapRow("({0} >= {1})", torch.ge),
    "and": MapRow("({0} & {1})", torch.bitwise_and),
    "or": MapRow("({0} | {1})", torch.bitwise_or),
    "xor": MapRow("({0} ^ {1})", torch.bitwise_xor),
    "shift_left": MapRow("({0} << {1})", torch.bitwise_left_shift),
    "shift_right": MapRow("({0} >> {1})", torch.bitwise_right_shift),
    # three operands
    "where": MapRow("tl.where({0}, {1}, {2})", torch.where),
}

REDUCES: dict[str, ReduceRow] = {
    "sum": ReduceRow(0, torch.sum),
    "prod": ReduceRow(1, torch.prod),
    "max": ReduceRow("lowest", torch.amax),
    "min": ReduceRow("highest", torch.amin),
    "any": ReduceRow(0, torch.any),
    # position (int64) of the first extremum in row-major order of the reduced axes; NaN wins
    "argmax": ReduceRow("lowest", torch.argmax),
    "argmin": ReduceRow("highest", torch.argmin),
}

SCANS: dict[str, ReduceRow] = {
    "cumsum": ReduceRow(0, torch.cumsum),
    "cumprod": ReduceRow(1, torch.cumprod),
}
