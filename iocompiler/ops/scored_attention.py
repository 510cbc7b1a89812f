"""`iocompiler::scored_attention`: attention whose scores go through a program, opaque to the
planner.

    out = dropout(softmax(score(query @ key^T, b, h, i, j) where keep(b, h, i, j))) @ value

or, of a program whose scores are weights, with no softmax. Beside it stands the log-sum-exp of each
row of scores, by which a caller may go on (a sink's share of the row, a loss).

The program (``tile/score.py``) travels as text; the tensors it loads stand beside query, key and
value. Which blocks a mask leaves that reads one may be given, where calls share it, and the lists
of them (`attention_classes`). On a GPU the Triton templates of ``codegen/kernels/`` run it, else
aten, block by block.
Gradients flow to query, key, value and to operands of floating point.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iocompiler.cost_model.attention_tiles import Row, chosen
from iocompiler.ops import library, target
from iocompiler.ops.attempt import template_or
from iocompiler.ops.attention_classes import TABLE
from iocompiler.ops.scored_call import GIVEN, LOG2_E, SAVED, Call, parted, templates
from iocompiler.tile.score import ScoreProgram, parsed

FORWARD = library.define(f"scored_attention({GIVEN}) -> (Tensor out, Tensor logsumexp)")
BACKWARD = library.define(
    f"scored_attention_backward({SAVED}, {GIVEN}) -> (Tensor dquery, Tensor dkey, Tensor dvalue)"
)
OPERAND = library.define(f"scored_attention_operand({SAVED}, {GIVEN}, int which) -> Tensor")
ROWS = library.define("scored_attention_rows(Tensor logsumexp, str kernel) -> Tensor")
WIDEST = 256


def scored_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    program: ScoreProgram,
    operands: Sequence[Tensor] = (),
    numbers: Sequence[int] = (),
    *,
    kernel: str = "",
    layout: str = "",
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention with a score program.

    Args:
        query: [B, H, S, D], floating point, any strides.
        key, value: [B, G, K, D] and [B, G, K, E]; G divides H.
        operands: what the program loads; differentiable where of floating point.
        numbers: its run-time integers.
        kernel: "template" or "blockwise"; chosen where "".
        layout: the memory orders of query, key, value and output, letters of
            `attention_choice.MEMORY`; of the output's gradients too.
        dropout_p: probabilities are dropped with this one, in [0, 1), and the others multiplied by
            1 / (1 - dropout_p); which, is a function of ``seed``, one int64, and of their places
            (``tile/dropout.py``).

    Returns:
        [B, H, S, E] in the inputs' dtype.

    Raises:
        ValueError: dropout without a seed, or of a program whose rows may be a mean of the values,
            or that has no softmax.
    """
    if dropout_p and (seed is None or program.empty in ("uniform", "weights")):
        raise ValueError("dropout takes a seed, and no program that is 'uniform' or 'weights'")
    out: Tensor = FORWARD(
        *(query, key, value, list(operands), list(numbers), program.key),
        *(kernel or choose(query, value), layout or "ssss", seed, dropout_p, None, []),
    )[0]
    return out


def choose(query: Tensor, value: Tensor) -> str:
    """The kernel for these (fake) tensors."""
    fits = query.dtype in (torch.float16, torch.bfloat16, torch.float32)
    narrow = all(isinstance(x.shape[3], int) and x.shape[3] <= WIDEST for x in (query, value))
    on_gpu = target.device_type(query) == "cuda"
    return "template" if on_gpu and fits and narrow else "blockwise"


def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    call = Call(*given)
    out = call.output()
    if call.is_empty:
        shape, wide = call.logsumexp()
        return out.zero_(), call.query.new_full(shape, math.inf, dtype=wide)
    if call.kernel == "template":
        return template_or(
            "an attention",
            lambda: (out, templates().forward(call.problem(), out)),
            lambda: _forward_by_blocks(call, out),
        )
    return _forward_by_blocks(call, out)


def _forward_by_blocks(call: Call, out: Tensor) -> tuple[Tensor, Tensor]:
    """With a logsumexp as the call's kernel has it."""
    shape, _ = call.logsumexp()
    found, lse = call.blockwise().forward()
    if not shape[0]:
        return out.copy_(found), lse.new_empty(shape)
    if call.kernel == "template":
        lse = torch.cat([lse[None] * LOG2_E, lse.new_zeros((shape[0] - 1, *lse.shape))])
    return out.copy_(found), lse.expand(shape).contiguous()


def _forward_fake(*given: Any) -> tuple[Tensor, Tensor]:
    call = Call(*given)
    shape, wide = call.logsumexp()
    return call.output(), call.query.new_empty(shape, dtype=wide)


def _rows(logsumexp: Tensor, kernel: str) -> Tensor:
    """Of each row [B, H, S], to the base of e, -inf where no score counts; from what the forward
    returns, which is as its backward reads it: +inf there, a template's to the base of two and
    where a program is deep in two summands.
    """
    first, *rest = logsumexp.unbind(0)
    natural = functools.reduce(torch.add, rest, first) / LOG2_E if kernel == "template" else first
    return natural.masked_fill(first == math.inf, -math.inf)


def _backward(*given: Any) -> tuple[Tensor, ...]:
    saved, call = parted(given)
    results = call.gradients()
    call.differentiate(saved, results)
    return results


def _backward_fake(*given: Any) -> tuple[Tensor, ...]:
    return parted(given)[1].gradients()


def _operand(*given: Any) -> Tensor:
    *of_call, which = given
    saved, call = parted(of_call)
    if call.is_empty:
        return torch.zeros_like(call.operands[which], memory_format=torch.contiguous_format)
    if call.kernel == "template":
        from iocompiler.runtime.attention_operands import operand_gradient

        return template_or(
            "the gradient of what an attention's scores read",
            lambda: operand_gradient(call.problem(), *saved.of_template(), which),
            lambda: call.blockwise().operand_gradient(*saved.of_blocks(call.kernel), which),
        )
    return call.blockwise().operand_gradient(*saved.of_blocks(call.kernel), which)


def _operand_fake(*given: Any) -> Tensor:
    *of_call, which = given
    operand: Tensor = parted(of_call)[1].operands[which]
    return operand.new_empty(operand.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, operands, *ctx.setting, seed, ctx.dropout_p, classes, tables = inputs
    ctx.tables = len(tables)
    ctx.save_for_backward(query, key, value, seed, classes, *operands, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, of_rows: Tensor | None) -> tuple[Any, ...]:
    query, key, value, seed, classes, *operands, out, lse = ctx.saved_tensors
    # torch takes an empty list of numbers for one of tensors
    unused: tuple[Any, ...] = (
        [] if ctx.setting[0] == [] else None,
        *(None for _ in ctx.setting[1:]),
        *(None, None, None, [None] * ctx.tables),
    )
    if grad is None and of_rows is None:
        return (None, None, None, [None] * len(operands), *unused)
    saved = (torch.zeros_like(out) if grad is None else grad, out, lse, of_rows)
    tables = _backward_tables(query, key, value, ctx.setting[1], classes)
    of_call = (query, key, value, operands, *ctx.setting, seed, ctx.dropout_p, classes, tables)
    given = (*saved, *of_call)
    needed = ctx.needs_input_grad[:3]
    found = BACKWARD(*given) if any(needed) else (None, None, None)
    wanted = ctx.needs_input_grad[3]
    wanted = wanted if isinstance(wanted, (list, tuple)) else [wanted] * len(operands)
    slopes = [OPERAND(*given, n) if need else None for n, need in enumerate(wanted)]
    return (*found, slopes, *unused)


def tiles_of(program: ScoreProgram, query: Tensor, value: Tensor) -> Row:
    """The tiles of the template's kernels for these (fake) tensors."""
    width = max(query.shape[3], value.shape[3])
    return chosen(program, target.capability(query), query.element_size(), width)


def _backward_tables(
    query: Tensor, key: Tensor, value: Tensor, program: str, classes: Tensor | None
) -> list[Tensor]:
    """The lists of blocks that the backward visits, where the classes are known."""
    if classes is None:
        return []
    tiles = tiles_of(parsed(program), query, value)
    sizes, block = [query.shape[2], key.shape[2]], list(tiles.grain)
    return [
        TABLE(classes, sizes, block, [tile.m, tile.n], transposed)
        for tile, transposed in ((tiles.dq, False), (tiles.dkv, True))
    ]


library.implement("scored_attention", _forward, _forward_fake, launches=True, replays=True)
library.implement(
    "scored_attention_backward", _backward, _backward_fake, launches=True, replays=True
)
library.implement("scored_attention_operand", _operand, _operand_fake, launches=True, replays=True)
library.differentiate("scored_attention", _differentiate, _setup)
library.compose("scored_attention_rows", _rows)
