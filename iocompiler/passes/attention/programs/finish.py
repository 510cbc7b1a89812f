"""A finished score program: one that the kernels compute, without what it does not load."""

from __future__ import annotations

from iocompiler.passes.attention.reading.description import Declined
from iocompiler.tile.score import ScoreProgram
from iocompiler.tile.score_algebra import derivative
from iocompiler.tile.score_builder import ScoreBuilder
from iocompiler.tile.score_operands import use

_MOST_OPS = 80
_MOST_OPERANDS = 8


def check(program: ScoreProgram) -> None:
    """Raise `Declined` where a gradient is none the kernels compute, or the program is too long."""
    product = next((n for n, op in enumerate(program.ops) if op.kind == "score"), None)
    if product is None:
        raise Declined("the scores do not depend on the query")
    derivative(program, product)
    loads = program.loads(program.score, program.keep)
    if len(program.ops) > _MOST_OPS or len(loads) > _MOST_OPERANDS:
        raise Declined("the score program is too long")
    for load in program.loads(program.score):
        if program.ops[load].type == "float":
            if use(program, load) is None:
                raise Declined("a bias whose gradient has no kernel")
            widened, slope = derivative(program, load)
            # what a softmax sends back to the scores of a row adds up to zero
            if program.planes and product in widened.behind(slope):
                raise Declined("what the scores are multiplied by has a gradient that cancels out")


def renumbered(program: ScoreProgram) -> tuple[ScoreProgram, list[int]]:
    """Operands counted without those that nothing loads any more, and which of them are left."""
    loads = program.loads(program.score, program.keep)
    used = sorted({int(program.ops[load].value) for load in loads})
    build = ScoreBuilder()
    for op in program.ops:
        if op.kind == "load":
            values = {**vars(op), "value": used.index(int(op.value))}
            op = type(op)(**values)
        build.ops.append(op)
    return ScoreProgram(tuple(build.ops), program.score, program.keep, program.empty), used
