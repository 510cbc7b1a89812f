"""Score programs parted: what is the same for a row of scores needs no work for each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from iocompiler.tile.score import ScoreOp, ScoreProgram
from iocompiler.tile.score_builder import ScoreBuilder


def lifted(program: ScoreProgram) -> tuple[ScoreProgram, ScoreProgram | None]:
    """What varies along a row of scores, and what does not (None where there is nothing of it):

        x + f (p i + q j + c)  -->  x + f q (j - o),   f (p (i - o) + (p + q) o + c)

    with f and c of neither i nor j, p and q literals. The sum is the same for every position o, the
    index "o" of both programs; with one near i and j nothing is lost to rounding.
    """
    build = ScoreBuilder(list(program.ops))
    lines, others = [], []
    for value, sign in _terms(program.ops, program.score, 1.0):
        line = _line(build, value)
        if line is None or not (line.i or line.j):
            others.append((value, sign))
        else:
            lines.append(line.times(build, build.const(sign)))
    # scores so low that sums are lost beside them stay as they are
    if not lines or not others or program.deep:
        return program, None
    score = None
    for value, sign in others:
        score = _plus(build, score, build.map("mul", value, build.const(sign)))
    lift = None
    for line in lines:
        score = _plus(build, score, line.along(build))
        lift = _plus(build, lift, line.of_row(build))
    assert score is not None
    assert lift is not None
    return (
        build.program(score, program.keep, program.empty),
        build.program(lift, None, program.empty),
    )


def factored(program: ScoreProgram) -> tuple[float, ScoreProgram]:
    """The positive constant the score is multiplied by last, and the program without it.

    It is 1 where the score may be so low that its product is lost to rounding: where it is made of
    elements, which may be masks.
    """
    op = program.ops[program.score]
    if op.fn != "mul" or program.deep:
        return 1.0, program
    factor = program.ops[op.inputs[1]]
    loads = (program.ops[load].type for load in program.loads(program.score))
    if factor.kind != "const" or not 0.0 < float(factor.value) < math.inf or "float" in loads:
        return 1.0, program
    build = ScoreBuilder(list(program.ops))
    return float(factor.value), build.program(op.inputs[0], program.keep, program.empty)


@dataclass(frozen=True)
class _Line:
    """``factor * (i * row + j * column + constant)``; None for a factor of 1, a constant of 0."""

    i: float
    j: float
    constant: int | None = None
    factor: int | None = None

    def times(self, build: ScoreBuilder, by: int) -> _Line:
        literal = build.literal(by)
        if literal is None:
            return replace(self, factor=_product(build, self.factor, by))
        scale = float(literal)
        moved = None if self.constant is None else build.map("mul", self.constant, by)
        return replace(self, i=self.i * scale, j=self.j * scale, constant=moved)

    def along(self, build: ScoreBuilder) -> int | None:
        """``factor j (column - o)``."""
        if not self.j:
            return None
        return build.map("mul", _distance(build, "j"), self._slope(build, self.j))

    def of_row(self, build: ScoreBuilder) -> int | None:
        """``factor (i (row - o) + (i + j) o + constant)``."""
        total = None
        if self.i:
            total = build.map("mul", _distance(build, "i"), self._slope(build, self.i))
        if self.i + self.j:
            origin = build.cast(build.index("o"), "float")
            start = build.map("mul", origin, self._slope(build, self.i + self.j))
            total = _plus(build, total, start)
        if self.constant is not None:
            total = _plus(build, total, _product(build, self.factor, self.constant))
        return total

    def _slope(self, build: ScoreBuilder, literal: float) -> int:
        return _product(build, self.factor, build.const(literal))


def _terms(ops: tuple[ScoreOp, ...], value: int, sign: float) -> list[tuple[int, float]]:
    """The values a sum is made of, and their signs."""
    op = ops[value]
    if op.kind != "map" or op.fn not in ("add", "sub", "neg"):
        return [(value, sign)]
    signs = {"add": (sign, sign), "sub": (sign, -sign), "neg": (-sign,)}[op.fn]
    pairs = zip(op.inputs, signs, strict=True)
    return [term for each, own in pairs for term in _terms(ops, each, own)]


def _line(build: ScoreBuilder, value: int) -> _Line | None:
    op = build.ops[value]
    if not _varies(build, value):
        return _Line(0.0, 0.0, value)
    if op.kind == "cast":
        index = build.ops[op.inputs[0]]
        if index.kind == "index" and op.type == "float":
            return _Line(float(index.fn == "i"), float(index.fn == "j"))
        return None
    if op.kind != "map" or op.fn not in ("add", "sub", "neg", "mul"):
        return None
    if op.fn == "mul":
        varying = [each for each in op.inputs if _varies(build, each)]
        if len(varying) != 1:
            return None
        line = _line(build, varying[0])
        other = op.inputs[1] if varying[0] == op.inputs[0] else op.inputs[0]
        return None if line is None else line.times(build, other)
    total = _Line(0.0, 0.0)
    for place, each in enumerate(op.inputs):
        line = _line(build, each)
        if line is None or line.factor is not None:
            return None
        if op.fn == "neg" or (op.fn == "sub" and place == 1):
            line = line.times(build, build.const(-1.0))
        total = _Line(
            total.i + line.i, total.j + line.j, _plus(build, total.constant, line.constant)
        )
    return total


def _varies(build: ScoreBuilder, value: int) -> bool:
    """Whether a value depends on the score, i or j."""
    op = build.ops[value]
    if op.kind == "score" or (op.kind == "index" and op.fn in "ij"):
        return True
    return any(_varies(build, each) for each in op.inputs)


def _distance(build: ScoreBuilder, name: str) -> int:
    # subtracted before the cast: along a block of keys it is then the same in every block
    apart = build.map("sub", build.index(name), build.index("o"))
    return build.add(ScoreOp("cast", "float", "", (apart,)))


def _plus(build: ScoreBuilder, one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return build.map("add", one, other)


def _product(build: ScoreBuilder, one: int | None, other: int) -> int:
    return other if one is None else build.map("mul", one, other)
