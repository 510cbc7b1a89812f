"""`iocompiler::attention_forward` and its backward: attention that never holds an S x K matrix,
opaque to the planner.

    out = softmax(scale * query @ key^T + bias, where causal only over j <= i; then dropout) @ value

The kernel and the memory layout are arguments, chosen by `attention_choice.choose` when the graph
is rewritten, so that what is promised about strides at compile time is what comes out at run time.
Saved for the backward: the inputs, the output, one log-sum-exp a row, and the random state of
dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iocompiler.ops import attention_kernels as kernels
from iocompiler.ops import library
from iocompiler.ops.attention_choice import MEMORY, choose

_SETTING = "float scale, bool causal, float dropout_p, str kernel, str layout"
_FORWARD = (
    f"(Tensor query, Tensor key, Tensor value, Tensor? bias, {_SETTING}) "
    "-> (Tensor out, Tensor logsumexp, Tensor seed, Tensor offset)"
)
FORWARD = library.define(f"attention_forward{_FORWARD}", torch.Tag.nondeterministic_seeded)
WITHOUT_DROPOUT = library.define(f"attention_forward_without_dropout{_FORWARD}")
"""The same, told by its name not to be random: who partitions a graph asks no more."""
BACKWARD = library.define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? bias, "
    f"Tensor out, Tensor logsumexp, Tensor seed, Tensor offset, {_SETTING}, bool bias_grad) "
    "-> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dbias)",
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    kernel: str = "",
) -> Tensor:
    """Attention by the kernel that suits the inputs, or by the one named.

    Args:
        query: [B, H, S, D], floating point, any strides.
        key, value: [B, G, K, D] and [B, G, K, E]; G divides H, query head h reads head h // (H /
            G).
        bias: broadcastable to [B, H, S, K], of the inputs' dtype; differentiable.
        scale: D ** -0.5 where None.
        causal: query i sees keys j <= i (counted from the start, also where S != K).
        kernel: one of `attention_choice.KERNELS`; chosen where "".

    Returns:
        [B, H, S, E] in the inputs' dtype.
    """
    choice = choose(query, key, value, bias, causal=causal, dropout_p=dropout_p)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    layout = choice.layout if not kernel else "ssss"
    out: Tensor = FORWARD(
        query, key, value, bias, scale, causal, dropout_p, kernel or choice.kernel, layout
    )[0]
    return out


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    causal: bool,
    dropout_p: float,
    kernel: str,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    setting = kernels.Setting(scale, causal, dropout_p)
    shape = (*query.shape[:3], value.shape[3])
    run = kernels.FORWARD[kernel if query.numel() and key.numel() else "blockwise"]
    out, lse, seed, offset = run(query, key, value, bias, setting)
    if lse.shape[2] != _rows(query, kernel):  # empty inputs
        lse = lse.new_zeros((*lse.shape[:2], _rows(query, kernel)))
    return arranged(out, shape, layout[3]), lse.to(lse_dtype(query)).contiguous(), seed, offset


def _output(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *setting: Any
) -> Tensor:
    """`_forward`'s first result."""
    *fixed, kernel, layout = setting
    if kernel not in kernels.OUTPUT or not query.numel() or not key.numel():
        return _forward(query, key, value, bias, *setting)[0]
    out = kernels.OUTPUT[kernel](query, key, value, bias, kernels.Setting(*fixed))
    return arranged(out, (*query.shape[:3], value.shape[3]), layout[3])


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    causal: bool,
    dropout_p: float,
    kernel: str,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _empty(query, (*query.shape[:3], value.shape[3]), layout[3])
    lse = query.new_empty((*query.shape[:2], _rows(query, kernel)), dtype=lse_dtype(query))
    return out, lse, *_fake_state(query, dropout_p, kernel)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    seed: Tensor,
    offset: Tensor,
    scale: float,
    causal: bool,
    dropout_p: float,
    kernel: str,
    layout: str,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    setting = kernels.Setting(scale, causal, dropout_p)
    empty = not query.numel() or not key.numel()
    if empty:
        logsumexp = logsumexp[:, :, : query.shape[2]]
    run = kernels.BACKWARD["blockwise" if empty else kernel]
    saved = (out, logsumexp, seed, offset)
    dq, dk, dv, db = run(grad, query, key, value, bias, saved, setting, bias_grad)
    laid_out = [
        arranged(d, x.shape, o)
        for d, x, o in zip((dq, dk, dv), (query, key, value), layout, strict=False)
    ]
    return (
        laid_out[0],
        laid_out[1],
        laid_out[2],
        query.new_empty((0,)) if db is None else db.contiguous(),
    )


def _backward_fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    seed: Tensor,
    offset: Tensor,
    scale: float,
    causal: bool,
    dropout_p: float,
    kernel: str,
    layout: str,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (_empty(x, x.shape, o) for x, o in zip((query, key, value), layout, strict=False))
    return (
        dq,
        dk,
        dv,
        bias.new_empty(bias.shape) if bias is not None and bias_grad else query.new_empty((0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, bias, *ctx.setting = inputs
    ctx.save_for_backward(query, key, value, bias, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    unused = (None,) * len(ctx.setting)
    if grad is None:
        return (None, None, None, None, *unused)
    query, key, value, bias, *saved = ctx.saved_tensors
    bias_grad = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, db = BACKWARD(grad, query, key, value, bias, *saved, *ctx.setting, bias_grad)
    return dq, dk, dv, db if bias_grad else None, *unused


for _name in ("attention_forward", "attention_forward_without_dropout"):
    library.implement(_name, _forward, _forward_fake, first=_output, replays=True)
library.implement("attention_backward", _backward, _backward_fake, replays=True)
library.differentiate("attention_forward", _differentiate, _setup)


def _rows(query: Tensor, kernel: str) -> int:
    rows = query.shape[2]
    if kernel != "efficient":
        return rows
    aligned = kernels.LSE_ALIGNMENT
    return (rows + aligned - 1) // aligned * aligned


def lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _fake_state(query: Tensor, dropout_p: float, kernel: str) -> tuple[Tensor, Tensor]:
    if not dropout_p:
        return query.new_empty((0,), dtype=torch.int64), query.new_empty((0,), dtype=torch.int64)
    if kernel == "flash":
        return query.new_empty((2,), dtype=torch.uint64), query.new_empty((), dtype=torch.uint64)
    if kernel == "blockwise":
        return query.new_empty((1,), dtype=torch.int64), query.new_empty((0,), dtype=torch.int64)
    # the memory-efficient kernel keeps its two numbers on the host
    device = "cpu" if kernel == "efficient" else query.device
    return query.new_empty((), dtype=torch.int64, device=device), query.new_empty(
        (), dtype=torch.int64, device=device
    )


def _empty(like: Tensor, shape: Any, order: str) -> Tensor:
    dims = MEMORY[order]
    return like.new_empty([shape[d] for d in dims]).permute(_inverse(dims))


def arranged(x: Tensor, shape: Any, order: str) -> Tensor:
    """``x`` in the promised memory order, copied only where it lies otherwise."""
    if x.shape != shape:
        x = x.reshape(shape)
    dims = MEMORY[order]
    return x if _lies(x, dims) else x.permute(dims).contiguous().permute(_inverse(dims))


def _lies(x: Tensor, dims: tuple[int, ...]) -> bool:
    """Whether ``x`` is contiguous with its dims in this order: numbers, where a view takes the host
    longer than a launch.
    """
    shape, stride, step = x.shape, x.stride(), 1
    for dim in reversed(dims):
        if shape[dim] != 1 and stride[dim] != step:
            return False
        step *= shape[dim]
    return True


def _inverse(dims: tuple[int, ...]) -> list[int]:
    return [dims.index(d) for d in range(len(dims))]
