"""Score programs as the Triton functions an attention template is given.

The scores the functions return are multiplied by log2(e), so that the templates may use exp2; the
factor is folded into constants where it can be. Scores that are weights are as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from iocompiler.codegen.prelude import PRELUDE
from iocompiler.tile import dropout
from iocompiler.tile.ops import MAPS
from iocompiler.tile.score import ScoreOp, ScoreProgram
from iocompiler.tile.score_algebra import LOG2E, derivative, peeled, scaled
from iocompiler.tile.score_lift import factored, lifted

_PLACES = "b, h, i, j"
# faster than the op table's text, which rounds as eager does: what follows is a softmax
_FAST = {
    "div": "{0} / {1}",
    "sqrt": "tl.sqrt({0})",
    "tanh": "_soft_tanh({0})",
    "coarse_tanh": "_coarse_tanh({0})",
}
_TANH = '''

@triton.jit
def _soft_tanh(x):
    """1 - 2 / (1 + exp(2 x)): errs by 1e-6 at most, with no case apart for small x."""
    above = 1.0 + tl.exp2(x * 2.8853900817779268)
    return 1.0 - 2.0 * tl.rsqrt(above * above)  # one step where a division takes several


@triton.jit
def _coarse_tanh(x):
    """Within 2^-11 of it, a fourth of what a rounding to bfloat16 may err by: one instruction."""
    if _ASSEMBLES:
        found = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        found = _soft_tanh(x)
    return found
'''
# the bits of `tile/dropout.py`
_DROP = f'''

@triton.jit
def drop(seed, b, h, first, row, start, column):
    """1 where dropout leaves a probability, else 0, from a seed and its place: i is the first row
    of a block of at least 16, or 0, plus the row, j the start of such a block plus the column. Rows
    and columns eight apart share a hash in a way to be seen: it is found once where a thread holds
    them.
    """
    high = (seed >> 32).to(tl.uint32) ^ b.to(tl.uint32)
    low, high = _philox(seed.to(tl.uint32), h.to(tl.uint32), high)
    low = low + (first >> 1).to(tl.uint32) * {dropout.ROW}
    low = low + (start >> 1).to(tl.uint32) * {dropout.COLUMN}
    rows = ((row & 7) + ((row >> 4) << 3)).to(tl.uint32)
    columns = ((column & 7) + ((column >> 4) << 3)).to(tl.uint32)
    word = columns * {dropout.COLUMN} + (rows * {dropout.ROW} + low)
    product = word.to(tl.uint64) * {dropout.FIRST}  # one wide multiplication gives both halves
    word = (product >> 32).to(tl.uint32) ^ product.to(tl.uint32) ^ high
    product = word.to(tl.uint64) * {dropout.SECOND}
    word = (product >> 32).to(tl.uint32) ^ product.to(tl.uint32)
    word = tl.where((row & 8) != 0, word * {dropout.THIRD}, word)
    return tl.where(tl.where((column & 8) != 0, word << 16, word) >= {{threshold}}, 1.0, 0.0)
'''
_CASTS = {"float": "tl.float32", "int": "tl.int32", "bool": "tl.int1"}


def module_text(
    program: ScoreProgram,
    ranks: Sequence[int],
    gradients: Sequence[int] = (),
    dropout_p: float = 0.0,
    *,
    lifts: bool = False,
) -> str:
    """A Python module with the functions of a program.

    ``FACTOR * new_score + lift`` and ``keep`` are the program, the first in units of log2(e) (with
    no softmax: of 1) and with any position ``o`` (`lifted`); ``slope`` is the new score's
    derivative by ``SCALE`` times the dot product; ``gradient_<load>`` its derivative by a load;
    ``drop`` says which probabilities dropout leaves, and ``KEPT`` what they are multiplied by. What
    is not needed (the score as it is, nothing lifted, masked or dropped, a derivative of 1) is
    None.

    Args:
        ranks: the number of dims of each operand.
        gradients: the loads (places in the program) that are differentiated.
        dropout_p: of the probabilities.
        lifts: what a row of scores shares may be told apart: costs some of float32's last bits.
    """
    scale, rest = peeled(program)
    product = _product(rest)
    text = PRELUDE + _TANH + f"\nSCALE = {scale!r}\n"
    normal = program.empty != "weights"
    whole = scaled(rest, LOG2E if normal else 1.0, scale)
    forward, lift = lifted(whole) if lifts and normal else (whole, None)
    factor, forward = factored(forward) if normal else (1.0, forward)
    text += f"FACTOR = {factor!r}\n"
    if forward.ops[forward.score].kind == "score":
        text += "\nnew_score = None\n"
    else:
        places = f"s, {_PLACES}, o"
        text += _function("new_score", places, forward, ranks, (forward.score,))
    if lift is None:
        text += "\nlift = None\n"
    else:
        text += _function("lift", "b, h, i, o", lift, ranks, (lift.score,))
    if program.keep is None:
        text += "\nkeep = None\n"
    else:
        text += _function("keep", _PLACES, program, ranks, (program.keep,))
    widened, slope = derivative(rest, product) if product is not None else (rest, None)
    if product is None or slope is None:
        text += "\nslope = None\n"
    else:
        text += _function("slope", f"s, {_PLACES}", widened, ranks, (slope,))
    text += (
        _DROP.format(threshold=dropout.threshold(dropout_p)) if dropout_p else "\n\ndrop = None\n"
    )
    text += f"KEPT = {1.0 / (1.0 - dropout_p)!r}\n"
    for load in gradients:
        text += _gradient(program, ranks, load)
    return text


def _product(program: ScoreProgram) -> int | None:
    return next((n for n, op in enumerate(program.ops) if op.kind == "score"), None)


def _gradient(program: ScoreProgram, ranks: Sequence[int], load: int) -> str:
    widened, slope = derivative(program, load)
    if slope is None:
        return f"\ngradient_{load} = None\n"
    return _function(f"gradient_{load}", f"s, {_PLACES}", widened, ranks, (slope,))


def _function(
    name: str,
    places: str,
    program: ScoreProgram,
    ranks: Sequence[int],
    results: Sequence[int | None],
) -> str:
    wanted = [value for value in results if value is not None]
    lines = []
    names: dict[int, str] = {}
    for value in sorted(program.behind(*wanted)):
        op = program.ops[value]
        names[value] = _inlined(op) or f"v{value}"
        if not _inlined(op):
            lines.append(f"    v{value} = {_text(op, [names[v] for v in op.inputs], ranks)}")
    returned = ", ".join(names[value] for value in wanted)
    body = "\n".join([*lines, f"    return {returned}"])
    return f"\n\n@triton.jit\ndef {name}({places}, operands, strides, numbers):\n{body}\n"


def _inlined(op: ScoreOp) -> str:
    """The text of what needs no name of its own; "" for the rest."""
    if op.kind == "score":
        return "s"
    if op.kind == "index":
        return op.fn
    if op.kind == "number":
        return f"numbers[{op.value}]"
    return _literal(op.value) if op.kind == "const" else ""


def _literal(value: float | int | bool) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    return repr(value) if value >= 0 else f"({value!r})"


def _text(op: ScoreOp, inputs: list[str], ranks: Sequence[int]) -> str:
    if op.kind == "load":
        first = sum(ranks[: int(op.value)])
        terms = [f"{x} * strides[{first + d}]" for d, x in enumerate(inputs) if x != "0"]
        loaded = f"tl.load({' + '.join([f'operands[{op.value}]', *terms])})"
        return f"{loaded}.to(tl.float32)" if op.type == "float" else loaded
    if op.kind == "cast":
        return f"tl.cast({inputs[0]}, {_CASTS[op.type]})"
    return _FAST.get(op.fn, MAPS[op.fn].triton).format(*inputs)
