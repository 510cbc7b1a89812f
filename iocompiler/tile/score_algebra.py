"""Score programs rewritten: multiplied by a constant, differentiated by the score or by an operand.

The derivative is forward-mode: each value depends on one variable, the dot product or one load, and
carries its derivative beside it as further values of the same program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from iocompiler.tile.score import ScoreOp, ScoreProgram
from iocompiler.tile.score_builder import ScoreBuilder

LOG2E = math.log2(math.e)


class NotDifferentiable(Exception):
    """The message names the operation without a derivative."""


def peeled(program: ScoreProgram) -> tuple[float, ScoreProgram]:
    """The constant the dot product is multiplied by first, and the program without it.

    Where the dot product is used in another way too, the constant is 1.
    """
    users = [op for op in program.ops for value in op.inputs if program.ops[value].kind == "score"]
    alone = program.ops[program.score].kind != "score"
    if len(users) != 1 or not alone or users[0].fn != "mul":
        return 1.0, program
    place = program.ops.index(users[0])
    factor = program.ops[users[0].inputs[1]]
    if factor.kind != "const" or factor.type != "float":
        return 1.0, program
    ops = list(program.ops)
    ops[place] = ScoreOp("score", "float")
    rest = ScoreBuilder(ops)
    return float(factor.value), rest.program(program.score, program.keep, program.empty)


def scaled(program: ScoreProgram, factor: float, of_product: float = 1.0) -> ScoreProgram:
    """The program whose score is ``factor`` times this one's, fed ``of_product`` times the dot
    product; constants are multiplied where that saves an operation.
    """
    build = ScoreBuilder()
    values: list[int] = []
    for op in program.ops:
        value = _copied(build, op, tuple(values[v] for v in op.inputs))
        if op.kind == "score" and of_product != 1.0:
            value = build.map("mul", value, build.const(of_product))
        values.append(value)
    score = _times(build, values[program.score], factor)
    keep = None if program.keep is None else values[program.keep]
    return build.program(score, keep, program.empty)


def _copied(build: ScoreBuilder, op: ScoreOp, inputs: tuple[int, ...]) -> int:
    if op.kind == "map":
        return build.map(op.fn, *inputs)
    return build.add(replace(op, inputs=inputs))


def _times(build: ScoreBuilder, value: int, factor: float) -> int:
    """``factor * value``, the factor moved to where it multiplies a constant or a single number."""
    op = build.ops[value]
    if op.kind == "map" and op.type == "float":
        if op.fn in ("add", "sub"):
            return build.map(op.fn, *(_times(build, each, factor) for each in op.inputs))
        if op.fn == "neg":
            return build.map("neg", _times(build, op.inputs[0], factor))
        if op.fn == "where":
            return build.map(
                "where", op.inputs[0], *(_times(build, each, factor) for each in op.inputs[1:])
            )
        if op.fn == "mul":
            small = min(op.inputs, key=lambda each: _points(build, each))
            other = op.inputs[1] if small == op.inputs[0] else op.inputs[0]
            return build.map("mul", other, _times(build, small, factor))
    return build.map("mul", value, build.const(factor))


def _points(build: ScoreBuilder, value: int) -> int:
    """How many different elements a tile of this value has: 0 for a literal, 3 for a full tile."""
    op = build.ops[value]
    if op.kind == "const":
        return 0
    if op.kind == "score":
        return 3
    if op.kind == "index":
        return 2 if op.fn in "ij" else 1
    reach = [_points(build, each) for each in op.inputs]
    return 3 if reach.count(2) > 1 else max(reach, default=1)


def derivative(program: ScoreProgram, by: int) -> tuple[ScoreProgram, int | None]:
    """The program with one more value: the derivative of its score by the value ``by`` (the dot
    product, or a load), None where it is 1 everywhere.

    Raises:
        NotDifferentiable: an operation on the way has no derivative here.
    """
    build = ScoreBuilder()
    values = [_same(build, op) for op in program.ops]
    assert values == list(range(len(program.ops)))
    one, zero = build.const(1.0), build.const(0.0)
    slopes: list[int] = []
    for place, op in enumerate(program.ops):
        if place == by:
            slopes.append(one)
        elif op.type != "float" or all(slopes[v] == zero for v in op.inputs):
            slopes.append(zero)
        elif op.kind == "cast":
            slopes.append(zero)  # from integers or bool
        else:
            slopes.append(_chain(build, place, op, [slopes[v] for v in op.inputs], zero))
    slope = slopes[program.score]
    widened = ScoreProgram(tuple(build.ops), program.score, program.keep, program.empty)
    return widened, None if slope == one else slope


def _same(build: ScoreBuilder, op: ScoreOp) -> int:
    build.ops.append(op)
    build._seen.setdefault((op, repr(op.value)), len(build.ops) - 1)
    return len(build.ops) - 1


def _chain(build: ScoreBuilder, place: int, op: ScoreOp, slopes: list[int], zero: int) -> int:
    if op.kind == "load":
        raise NotDifferentiable("a subscript that depends on the score")
    if op.fn == "where":
        return build.map("where", op.inputs[0], slopes[1], slopes[2])
    if op.fn not in PARTIALS:
        raise NotDifferentiable(op.fn)
    total = zero
    for partial, slope in zip(PARTIALS[op.fn], slopes, strict=True):
        if slope != zero:
            factor = partial(build, place, op.inputs)
            part = slope if factor is None else build.map("mul", slope, factor)
            total = part if total == zero else build.map("add", total, part)
    return total


_Partial = Callable[[ScoreBuilder, int, tuple[int, ...]], int | None]
"""The derivative by one input, of (builder, the result's place, the inputs); None is 1."""


def _one(build: ScoreBuilder, y: int, x: tuple[int, ...]) -> None:
    return None


def _minus_one(build: ScoreBuilder, y: int, x: tuple[int, ...]) -> int:
    return build.const(-1.0)


def _tanh(build: ScoreBuilder, y: int, x: tuple[int, ...]) -> int:
    return build.map("sub", build.const(1.0), build.map("mul", y, y))


def _sigmoid(build: ScoreBuilder, y: int, x: tuple[int, ...]) -> int:
    return build.map("mul", y, build.map("sub", build.const(1.0), y))


def _abs(build: ScoreBuilder, y: int, x: tuple[int, ...]) -> int:
    zero = build.const(0.0)
    negative = build.map("where", build.map("lt", x[0], zero), build.const(-1.0), zero)
    return build.map("where", build.map("gt", x[0], zero), build.const(1.0), negative)


def _quotient(build: ScoreBuilder, y: int, x: tuple[int, ...]) -> int:
    return build.map("neg", build.map("div", y, x[1]))


def _chosen(fn: str, place: int) -> _Partial:
    """The derivative of a maximum or minimum: shared evenly where both are equal."""

    def partial(build: ScoreBuilder, y: int, x: tuple[int, ...]) -> int:
        wins = build.map(fn, x[place], x[1 - place])
        half = build.map("eq", x[0], x[1])
        other = build.map("where", wins, build.const(1.0), build.const(0.0))
        return build.map("where", half, build.const(0.5), other)

    return partial


PARTIALS: dict[str, tuple[_Partial, ...]] = {
    "neg": (_minus_one,),
    "add": (_one, _one),
    "sub": (_one, _minus_one),
    "mul": (lambda b, y, x: x[1], lambda b, y, x: x[0]),
    "div": (lambda b, y, x: b.map("div", b.const(1.0), x[1]), _quotient),
    "tanh": (_tanh,),
    "coarse_tanh": (_tanh,),
    "sigmoid": (_sigmoid,),
    "exp": (lambda b, y, x: y,),
    "exp2": (lambda b, y, x: b.map("mul", y, b.const(math.log(2.0))),),
    "log": (lambda b, y, x: b.map("div", b.const(1.0), x[0]),),
    "sqrt": (lambda b, y, x: b.map("div", b.const(0.5), y),),
    "sin": (lambda b, y, x: b.map("cos", x[0]),),
    "cos": (lambda b, y, x: b.map("neg", b.map("sin", x[0])),),
    "abs": (_abs,),
    "maximum": (_chosen("gt", 0), _chosen("gt", 1)),
    "minimum": (_chosen("lt", 0), _chosen("lt", 1)),
}
"""For each operation, its derivative by each of its inputs. Clamps, relu and the like are made of
maximum and minimum."""
