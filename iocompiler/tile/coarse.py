"""Quotients and roots of which nobody sees more than a short float has.

In eager the result of an operator over bfloat16 is rounded to 2^-9 of it, to 2^-12 in float16. A
kernel computes it in float32, where rounding as IEEE 754 asks takes many instructions and a branch;
the rows ``coarse_div`` and ``coarse_sqrt`` of the op table err by 2^-22 at most, with zeros,
infinities, NaN and denormal numbers as they should be.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from iocompiler.tile.program import Op, TileProgram

COARSE = {"div": "coarse_div", "sqrt": "coarse_sqrt"}
_EXACT = {coarse: exact for exact, coarse in COARSE.items()}
_SHORT = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
# functions that a relative error of an operand goes through without growing
_FACTORS = frozenset({"mul", "neg", "abs", "where", "rsqrt", *COARSE, *_EXACT})
# those with no step: where the exact 2 has the value 2, so has what is nearly 2
_SMOOTH = _FACTORS | {
    *("add", "sub", "maximum", "minimum", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p"),
    *("sin", "cos", "sinh", "cosh", "tanh", "atan", "asin", "acos", "erf", "erfc"),
    *("normal_cdf", "normal_pdf", "sigmoid"),
}
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
# factors behind each other, each with an error of its own: 2^-19 together
_MOST_FACTORS = 8


def may_be_coarse(dtype: torch.dtype) -> bool:
    """Whether an operator whose result has this dtype rounds it far more than coarse rows err."""
    return dtype in _SHORT


def settled(program: TileProgram) -> TileProgram:
    """The program with coarse rows where they are not noticed, and only there.

    An exact quotient or root becomes coarse where all that reads it rounds it to a short float, at
    once or multiplied: ``(x / y).to(bfloat16)``. A coarse one becomes exact where something with a
    step reads it, of which 1.9999999 and 2 are far apart (``floor``), or where it is compared: what
    a backward computes again must be what the forward had, to the bit.
    """
    if not any(op.fn in COARSE or op.fn in _EXACT for op in program.ops):
        return program
    readers = _readers(program)
    compared, smooth, factors = _compared(program, readers), *_fates(program, readers)
    ops = list(program.ops)
    for position, op in enumerate(ops):
        if op.fn in _EXACT and (compared[position] or not smooth[position]):
            ops[position] = replace(op, fn=_EXACT[op.fn])
        elif op.fn in COARSE and op.dtype == torch.float32 and not compared[position]:
            if factors[position] <= _MOST_FACTORS:
                ops[position] = replace(op, fn=COARSE[op.fn])
    return replace(program, ops=tuple(ops))


def _readers(program: TileProgram) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in program.ops]
    for position, op in enumerate(program.ops):
        for read in op.reads:
            found[read].append(position)
    return found


def _compared(program: TileProgram, readers: list[list[int]]) -> list[bool]:
    """Whether a value, or what is made of it, is compared or looked for among others."""
    found = [False] * len(program.ops)
    for position in reversed(range(len(program.ops))):
        found[position] = any(found[r] or _compares(program.ops[r]) for r in readers[position])
    return found


def _compares(op: Op) -> bool:
    if op.kind == "reduce":
        return op.fn in ("max", "min", "argmax", "argmin")
    return op.kind == "map" and op.fn in _COMPARISONS


def _fates(program: TileProgram, readers: list[list[int]]) -> tuple[list[bool], list[float]]:
    """Of each value, whether all it reaches before it is rounded to a short float is smooth; and
    how many factors are on the way to there, infinitely many where it is anything else.
    """
    smooth = [False] * len(program.ops)
    factors = [float("inf")] * len(program.ops)
    for position in reversed(range(len(program.ops))):
        reading = [(r, program.ops[r]) for r in readers[position]]
        smooth[position] = bool(reading) and all(
            _rounds(op) or (_is_smooth(op) and smooth[r]) for r, op in reading
        )
        steps = [_steps(op, factors[r]) for r, op in reading]
        factors[position] = max(steps, default=float("inf"))
    return smooth, factors


def _steps(op: Op, behind: float) -> float:
    if _rounds(op):
        return 0
    return 1 + behind if op.kind == "map" and op.fn in _FACTORS else float("inf")


def _rounds(op: Op) -> bool:
    return op.kind == "cast" and op.dtype in _SHORT


def _is_smooth(op: Op) -> bool:
    if op.kind in ("reduce", "scan"):
        return op.fn in ("sum", "prod", "cumsum", "cumprod")
    return op.kind == "map" and op.fn in _SMOOTH
