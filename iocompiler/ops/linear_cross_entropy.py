"""`iocompiler::linear_cross_entropy`: the loss of a linear head, whose logits are never whole.

    z = x @ weight.T + bias;  z = outer * tanh(inner * z) if capped else outer * z
    row = coefficient * cross_entropy(z, target, ignore_index, label_smoothing)
          + squared * logsumexp(z)^2
    loss = row, its sum, or its sum over the number of targets that are not ignored

Rows are worked off in chunks (`linear_cross_entropy_chunks.py`). For "mean" and "sum" the forward
computes the gradients too, chunk by chunk, and the backward only scales them: three matrix products
in all. For "none", each row has a gradient of its own and the backward computes the logits again.
Where nothing needs a gradient, only losses are computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iocompiler.ops import library
from iocompiler.ops.linear_cross_entropy_chunks import Rows, Setting, accumulated, walk

_SETTING = "int ignore_index, float smoothing, float outer, float inner, bool capped"
_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? coefficient, Tensor? squared"
)
LINEAR_CROSS_ENTROPY = library.define(
    f"linear_cross_entropy({_INPUTS}, {_SETTING}, str reduction) -> Tensor"
)
LOSSES = library.define(f"linear_cross_entropy_losses({_INPUTS}, {_SETTING}) -> Tensor")
GRADIENTS = library.define(
    f"linear_cross_entropy_gradients({_INPUTS}, {_SETTING}, "
    "bool x_grad, bool weight_grad, bool bias_grad) "
    "-> (Tensor losses, Tensor dx, Tensor dweight, Tensor dbias)"
)


def _linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> Tensor:
    """Cross-entropy of a linear head.

    Args:
        x: [T, D], floating point. weight: [V, D]. bias: [V] or None.
        target: [T] int64; outside of 0 <= t < V only ``ignore_index``: another is an error on
            the CPU, and gives NaN on a GPU.
        rest: coefficient and squared, [T] or None, not differentiated; the numbers of `Setting`;
            "mean", "sum" or "none".

    Returns:
        float32 (float64 for float64 inputs): one number, or [T] where the reduction is "none".
    """
    needed = any(t is not None and t.requires_grad for t in (x, weight, bias))
    if needed and torch.is_grad_enabled():
        loss: Tensor = _Loss.apply(x, weight, bias, target, *rest)  # type: ignore[no-untyped-call]
        return loss
    return _reduced(LOSSES(x, weight, bias, target, *rest[:-1]), target, rest[2], rest[-1])


def _reduced(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / _count(target, ignore_index) if reduction == "mean" else total


def _count(target: Tensor, ignore_index: int) -> Tensor:
    return (target != ignore_index).sum()


class _Loss(torch.autograd.Function):
    """The three reductions; what is saved is told in the module's docstring."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *_, target, _, _ = tensors = inputs[:6]
        *setting, ctx.reduction = inputs[6:]
        ctx.setting, ctx.dtypes = setting, [t if t is None else t.dtype for t in inputs[:3]]
        if ctx.reduction == "none":
            ctx.save_for_backward(*tensors)
            losses: Tensor = LOSSES(*inputs[:-1])
            return losses
        *shares, scale = _scaled(tensors[4], tensors[5], tensors[0].dtype)
        needed = ctx.needs_input_grad[:3]
        losses, *gradients = GRADIENTS(*tensors[:4], *shares, *setting, *needed)
        ctx.save_for_backward(*gradients, target, scale)
        if scale is not None:
            losses = losses * scale
        return _reduced(losses, target, setting[0], ctx.reduction)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[:3]
        if ctx.reduction == "none":
            *inputs, coefficient, squared = ctx.saved_tensors
            grad = grad.contiguous()
            scaled = [
                grad if coefficient is None else grad * coefficient,
                None if squared is None else grad * squared,
            ]
            found = GRADIENTS(*inputs, *scaled, *ctx.setting, *needed)[1:]
        else:
            *found, target, scale = ctx.saved_tensors
            if scale is not None:
                grad = grad * scale
            if ctx.reduction == "mean":
                count = _count(target, ctx.setting[0])
                grad = torch.where(count == 0, 0.0, grad / count)  # as eager: nothing, not NaN
            found = [d * grad for d in found]
        kept = [
            d.to(dtype) if need else None
            for d, dtype, need in zip(found, ctx.dtypes, needed, strict=True)
        ]
        return (*kept, *(None,) * (len(ctx.setting) + 4))


def _scaled(
    coefficient: Tensor | None, squared: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Shares of the rows with a greatest of 1, and what they are to be multiplied by again: the
    gradients, made before the loss's own is known, are then within float16's range, like those of
    a loss without shares.
    """
    if dtype != torch.float16 or coefficient is None or not coefficient.numel():
        return coefficient, squared, None
    greatest = coefficient.abs().max()
    if squared is not None:
        greatest = torch.maximum(greatest, squared.abs().max())
    scale = torch.where((greatest > 0) & greatest.isfinite(), greatest, 1.0)
    return coefficient / scale, None if squared is None else squared / scale, scale


def _losses(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any) -> Tensor:
    return walk(x, weight, bias, target, Rows(*rest[:2]), Setting(*rest[2:]), None)[0]


def _losses_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=_wide(x))


def _gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows_of, setting = Rows(*rest[:2]), Setting(*rest[2:-3])
    losses, *found = walk(x, weight, bias, target, rows_of, setting, rest[-3:])
    dx, dweight, dbias = (x.new_empty((0,)) if d is None else d for d in found)
    return losses, dx, dweight, dbias


def _gradients_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_grad, weight_grad, bias_grad = rest[-3:]
    nothing = (0,)
    return (
        x.new_empty((x.shape[0],), dtype=_wide(x)),
        x.new_empty(x.shape if x_grad else nothing),
        weight.new_empty(weight.shape, dtype=accumulated(weight.dtype))
        if weight_grad
        else x.new_empty(nothing),
        x.new_empty((weight.shape[0],), dtype=_wide(x)) if bias_grad else x.new_empty(nothing),
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


library.compose("linear_cross_entropy", _linear_cross_entropy)
library.implement("linear_cross_entropy_losses", _losses, _losses_fake)
library.implement("linear_cross_entropy_gradients", _gradients, _gradients_fake)
