"""Quotients and roots of which nobody sees more than a short float has.

In eager the result of an operator over bfloat16 is rounded to 2^-9 of it, to 2^-12 in float16. A
kernel computes it in float32, where rounding as IEEE 754 asks takes many instructions and a branch;
the rows ``coarse_div`` and ``coarse_sqrt`` of the op table err by 2^-22 at most, with zeros,
infinities, NaN and denormal numbers as they should be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from iocompiler.tile.program import Op, TileProgram

COARSE = {"div": "coarse_div", "sqrt": "coarse_sqrt"}
_EXACT = {coarse: exact for exact, coarse in COARSE.items()}
_SHORT = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
# functions that a relative error of an operand goes through without growing
_FACTORS = frozenset({"mul", "neg", "abs", "where", "rsqrt", *COARSE, *_EXACT})
# those of numbers above zero alone
_ROOTS = frozenset({"sqrt", "coarse_sqrt", "rsqrt"})
_LOGARITHMS = frozenset({"log", "log2", "log10"})
# those of all numbers, and with no step: where the exact 2 has the value 2, so has what is nearly 2
_SMOOTH = (_FACTORS - _ROOTS) | {
    *("add", "sub", "maximum", "minimum", "exp", "exp2", "expm1", "sin", "cos", "sinh", "cosh"),
    *("tanh", "atan", "erf", "erfc", "normal_cdf", "normal_pdf", "sigmoid"),
}
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
_POSITIVE = frozenset({"sqrt", "coarse_sqrt", "rsqrt", "abs", "exp", "exp2", "sigmoid"})
# factors behind each other, each with an error of its own: 2^-19 together
_MOST_FACTORS = 8


def may_be_coarse(dtype: torch.dtype) -> bool:
    """Whether an operator whose result has this dtype rounds it far more than coarse rows err."""
    return dtype in _SHORT


def settled(program: TileProgram) -> TileProgram:
    """The program with coarse rows where they are not noticed, and only there.

    An exact quotient or root becomes coarse where all that reads it rounds it to a short float, at
    once or multiplied: ``(x / y).to(bfloat16)``, or is coarse in its turn: x / c.sqrt() for a
    float32 number c, where x has bfloat16. A coarse one becomes exact

    - where what reads it has a step or an end there may be no number behind: 1.9999999 and 2 are
      far apart for ``floor``, and 1 and 1.0000001 for ``sqrt(1 - x)``;
    - where it is compared: what a backward computes again must be to the bit what the forward had.
    """
    if not any(op.fn in COARSE or op.fn in _EXACT for op in program.ops):
        return program
    compared = _compared(program)
    fates = _fates(program, compared)
    ops = list(program.ops)
    for position, op in enumerate(ops):
        if op.fn in _EXACT and (compared[position] or not fates[position].smooth):
            ops[position] = replace(op, fn=_EXACT[op.fn])
        few = fates[position].factors <= _MOST_FACTORS and not compared[position]
        if op.fn in COARSE and op.dtype == torch.float32 and few:
            ops[position] = replace(op, fn=COARSE[op.fn])
    return replace(program, ops=tuple(ops))


def _compared(program: TileProgram) -> list[bool]:
    """Whether a value, or what is made of it, is compared or looked for among others."""
    found = [False] * len(program.ops)
    for position in reversed(range(len(program.ops))):
        op = program.ops[position]
        for read in op.reads:
            found[read] |= found[position] or _compares(op)
    return found


def _compares(op: Op) -> bool:
    if op.kind == "reduce":
        return op.fn in ("max", "min", "argmax", "argmin")
    return op.kind == "map" and op.fn in _COMPARISONS


@dataclass(frozen=True)
class _Fate:
    """What becomes of a value until it is rounded to a short float.

    ``smooth``: an error that is small beside it stays small; ``steady``: also one that is not, as
    a sum's may be whose terms nearly cancel. ``factors`` are behind each other, infinitely many
    where it is not multiplied alone.
    """

    smooth: bool = True
    steady: bool = True
    factors: float = 0

    def and_also(self, other: _Fate) -> _Fate:
        """Of a value that something else reads, too."""
        smooth, steady = self.smooth and other.smooth, self.steady and other.steady
        return _Fate(smooth, steady, max(self.factors, other.factors))


_NOWHERE = _Fate(False, False, math.inf)


def _fates(program: TileProgram, compared: list[bool]) -> list[_Fate]:
    positive = _not_negative(program)
    found = [_Fate()] * len(program.ops)
    for position in reversed(range(len(program.ops))):
        op, behind = program.ops[position], found[position]
        if op.fn in _EXACT and behind.smooth and not compared[position]:
            behind = replace(behind, factors=0)  # eager rounds it here
        of_positives = op.fn == "add" and all(positive[i] for i in op.inputs)
        for place, read in enumerate(op.reads):
            fate = _Fate() if _rounds(op) else _before(op, place, behind, of_positives)
            found[read] = found[read].and_also(fate)
    return found


def _before(op: Op, place: int, behind: _Fate, of_positives: bool) -> _Fate:
    """The fate of the operand at ``place`` of an operation, whose result's is ``behind``."""
    if op.kind in ("reduce", "scan"):
        return _Fate(behind.steady, behind.steady, math.inf) if _adds(op) else _NOWHERE
    if op.kind != "map":
        return _NOWHERE
    ends = op.fn in _ROOTS or op.fn in _LOGARITHMS or (place == 1 and op.fn.endswith("div"))
    steady = op.fn in _SMOOTH and not ends and behind.steady
    if op.fn in _FACTORS or of_positives:
        return _Fate(behind.smooth, steady, behind.factors + 1)
    return _Fate(steady or (op.fn in _LOGARITHMS and behind.steady), steady, math.inf)


def _rounds(op: Op) -> bool:
    return op.kind == "cast" and op.dtype in _SHORT


def _adds(op: Op) -> bool:
    return op.fn in ("sum", "cumsum")


def _not_negative(program: TileProgram) -> list[bool]:
    """Which values are known to be zero or above (or NaN)."""
    found: list[bool] = []
    for op in program.ops:
        known = [found[i] for i in op.inputs]
        if op.kind == "const":
            found.append(isinstance(op.value, (int, float)) and op.value >= 0)
        elif op.kind in ("reduce", "scan", "cast"):
            found.append(all(known) and op.dtype.is_floating_point)
        elif op.kind != "map":
            found.append(False)
        elif op.fn == "mul" and op.inputs[0] == op.inputs[1]:
            found.append(True)
        else:
            through = op.fn in ("mul", "div", "coarse_div", "add") and all(known)
            found.append(op.fn in _POSITIVE or through)
    return found
