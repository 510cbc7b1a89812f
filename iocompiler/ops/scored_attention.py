"""`iocompiler::scored_attention`: attention whose scores go through a program, opaque to the
planner.

    out = softmax(score(query @ key^T, b, h, i, j) where keep(b, h, i, j)) @ value

The program (``tile/score.py``) travels as text; the tensors it loads stand beside query, key and
value. On a GPU the Triton templates of ``codegen/kernels/`` run it, else aten, block by block.
Gradients flow to query, key, value and to operands of floating point.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iocompiler.ops import target
from iocompiler.ops.attention_choice import MEMORY
from iocompiler.ops.scored_blockwise import Blockwise
from iocompiler.tile.score import ScoreProgram, parsed

_GIVEN = (
    "Tensor query, Tensor key, Tensor value, Tensor[] operands, SymInt[] numbers, str program, "
    "str kernel, str layout"
)
_SAVED = "Tensor grad, Tensor out, Tensor logsumexp"
_LIBRARY: Any = torch.library.Library("iocompiler", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"scored_attention({_GIVEN}) -> (Tensor out, Tensor logsumexp)")
_LIBRARY.define(
    f"scored_attention_backward({_SAVED}, {_GIVEN}) -> (Tensor dquery, Tensor dkey, Tensor dvalue)"
)
_LIBRARY.define(f"scored_attention_operand({_SAVED}, {_GIVEN}, int which) -> Tensor")
FORWARD = torch.ops.iocompiler.scored_attention.default
BACKWARD = torch.ops.iocompiler.scored_attention_backward.default
OPERAND = torch.ops.iocompiler.scored_attention_operand.default
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

    Returns:
        [B, H, S, E] in the inputs' dtype.
    """
    kernel = kernel or choose(query, value)
    out: Tensor = FORWARD(
        query, key, value, list(operands), list(numbers), program.key, kernel, layout or "ssss"
    )[0]
    return out


def choose(query: Tensor, value: Tensor) -> str:
    """The kernel for these (fake) tensors."""
    fits = query.dtype in (torch.float16, torch.bfloat16, torch.float32)
    narrow = all(isinstance(x.shape[3], int) and x.shape[3] <= WIDEST for x in (query, value))
    on_gpu = target.device_type(query) == "cuda"
    return "template" if on_gpu and fits and narrow else "blockwise"


@functools.lru_cache(maxsize=512)
def _program(text: str) -> ScoreProgram:
    return parsed(text)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    numbers: Sequence[int],
    program: str,
    kernel: str,
    layout: str,
) -> tuple[Tensor, Tensor]:
    out = empty(query, (*query.shape[:3], value.shape[3]), layout[3])
    if not query.numel() or not key.numel():
        return out.zero_(), query.new_zeros(_rows(query, program), dtype=_wide(query))
    if kernel == "template":
        return out, _templates().forward(
            _problem(query, key, value, operands, numbers, program), out
        )
    found, lse = Blockwise(query, key, value, _program(program), operands, numbers).forward()
    return out.copy_(found), lse.expand(_rows(query, program)).contiguous()


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    numbers: Sequence[int],
    program: str,
    kernel: str,
    layout: str,
) -> tuple[Tensor, Tensor]:
    out = empty(query, (*query.shape[:3], value.shape[3]), layout[3])
    return out, query.new_empty(_rows(query, program), dtype=_wide(query))


def _backward(
    grad: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    numbers: Sequence[int],
    program: str,
    kernel: str,
    layout: str,
) -> tuple[Tensor, ...]:
    results = [empty(x, x.shape, o) for x, o in zip((query, key, value), layout, strict=False)]
    if not query.numel() or not key.numel():
        return tuple(x.zero_() for x in results)
    if kernel == "template":
        problem = _problem(query, key, value, operands, numbers, program)
        _templates().backward(problem, grad, out, logsumexp, results)
        return tuple(results)
    run = Blockwise(query, key, value, _program(program), operands, numbers)
    found = run.backward(grad, logsumexp[0])
    return tuple(x.copy_(y) for x, y in zip(results, found, strict=True))


def _backward_fake(
    grad: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    numbers: Sequence[int],
    program: str,
    kernel: str,
    layout: str,
) -> tuple[Tensor, ...]:
    given = zip((query, key, value), layout, strict=False)
    return tuple(empty(x, x.shape, order) for x, order in given)


def _operand(
    grad: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    numbers: Sequence[int],
    program: str,
    kernel: str,
    layout: str,
    which: int,
) -> Tensor:
    if not query.numel() or not key.numel():
        return torch.zeros_like(operands[which], memory_format=torch.contiguous_format)
    if kernel == "template":
        problem = _problem(query, key, value, operands, numbers, program)
        from iocompiler.runtime.attention_operands import operand_gradient

        return operand_gradient(problem, grad, out, logsumexp, which)
    run = Blockwise(query, key, value, _program(program), operands, numbers)
    return run.operand_gradient(grad, logsumexp[0], which)


def _operand_fake(
    grad: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    numbers: Sequence[int],
    program: str,
    kernel: str,
    layout: str,
    which: int,
) -> Tensor:
    return operands[which].new_empty(operands[which].shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, operands, *ctx.setting = inputs
    ctx.save_for_backward(query, key, value, *operands, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    query, key, value, *operands, out, lse = ctx.saved_tensors
    # torch takes an empty list of numbers for one of tensors
    unused: tuple[Any, ...] = (
        [] if ctx.setting[0] == [] else None,
        *(None for _ in ctx.setting[1:]),
    )
    if grad is None:
        return (None, None, None, [None] * len(operands), *unused)
    given = (grad, out, lse, query, key, value, operands, *ctx.setting)
    needed = ctx.needs_input_grad[:3]
    found = BACKWARD(*given) if any(needed) else (None, None, None)
    wanted = ctx.needs_input_grad[3]
    wanted = wanted if isinstance(wanted, (list, tuple)) else [wanted] * len(operands)
    slopes = [OPERAND(*given, n) if need else None for n, need in enumerate(wanted)]
    return (*found, slopes, *unused)


for _name, _run, _fake in (
    ("scored_attention", _forward, _forward_fake),
    ("scored_attention_backward", _backward, _backward_fake),
    ("scored_attention_operand", _operand, _operand_fake),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"iocompiler::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "iocompiler::scored_attention", _differentiate, setup_context=_setup, lib=_LIBRARY
)


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    numbers: Sequence[int],
    program: str,
) -> Any:
    given = (query, key, value, _program(program), tuple(operands), tuple(numbers))
    return _templates().Problem(*given)


def _templates() -> Any:
    # not before a template runs: it imports Triton
    from iocompiler.runtime import attention

    return attention


def _rows(query: Tensor, program: str) -> tuple[Any, ...]:
    return (2 if _program(program).sinks else 1, *query.shape[:3])


def _wide(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def empty(like: Tensor, shape: Any, order: str) -> Tensor:
    """Memory for a [B, H, S, D] tensor in one of the orders of `attention_choice.MEMORY`."""
    dims = MEMORY[order]
    back = [dims.index(d) for d in range(len(dims))]
    return like.new_empty([shape[d] for d in dims]).permute(back)
