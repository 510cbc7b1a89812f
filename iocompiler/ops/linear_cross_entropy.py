"""`iocompiler::linear_cross_entropy`: the loss of a linear head, whose logits are never whole.

    z = x @ weight.T + bias;  z = outer * tanh(inner * z) if capped else outer * z
    row = coefficient * cross_entropy(z, target, ignore_index, label_smoothing)
          + squared * logsumexp(z)^2
    loss = row, its sum, or its sum over the number of targets that are not ignored

Rows are worked off in chunks (`linear_cross_entropy_chunks.py`). For "mean" and "sum" the forward
computes the gradients too, those of the loss itself, chunk by chunk, and the backward multiplies
them by the loss's own, which nearly always is 1: three matrix products in all. For "none", each row
has a gradient of its own and the backward computes the logits again. Where nothing needs a
gradient, only losses are computed.

`iocompiler::linear_cross_entropy_and_logits` also returns x @ weight.T + bias, for programs that
keep it: the same pass over the rows puts it in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from iocompiler.ops import library
from iocompiler.ops.linear_cross_entropy_chunks import walk
from iocompiler.ops.linear_cross_entropy_head import accumulated
from iocompiler.ops.linear_cross_entropy_products import wide
from iocompiler.ops.linear_cross_entropy_rows import Rows, Setting

_SETTING = "int ignore_index, float smoothing, float outer, float inner, bool capped"
_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? coefficient, Tensor? squared"
)
LINEAR_CROSS_ENTROPY = library.define(
    f"linear_cross_entropy({_INPUTS}, {_SETTING}, str reduction) -> Tensor"
)
WITH_LOGITS = library.define(
    f"linear_cross_entropy_and_logits({_INPUTS}, {_SETTING}, str reduction) -> (Tensor, Tensor)"
)
LOSSES = library.define(
    f"linear_cross_entropy_losses({_INPUTS}, {_SETTING}, bool keep) "
    "-> (Tensor losses, Tensor logits)"
)
GRADIENTS = library.define(
    f"linear_cross_entropy_gradients({_INPUTS}, {_SETTING}, bool keep, "
    "bool x_grad, bool weight_grad, bool bias_grad) "
    "-> (Tensor losses, Tensor logits, Tensor dx, Tensor dweight, Tensor dbias)"
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
    return _loss(False, x, weight, bias, target, *rest)[0]


def _and_logits(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`_linear_cross_entropy` of the same arguments, and the logits [T, V] in the inputs' dtype."""
    return _loss(True, *inputs)


def _loss(keep: bool, *inputs: Any) -> tuple[Tensor, Tensor]:
    needed = any(t is not None and t.requires_grad for t in inputs[:3])
    if needed and torch.is_grad_enabled():
        found: tuple[Tensor, Tensor] = _Loss.apply(keep, *inputs)  # type: ignore[no-untyped-call]
        return found
    losses, logits = LOSSES(*inputs[:-1], keep)
    return _reduced(losses, inputs[3], inputs[6], inputs[-1]), logits


def _reduced(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / _count(target, ignore_index) if reduction == "mean" else total


def _count(target: Tensor, ignore_index: int) -> Tensor:
    return (target != ignore_index).sum()


class _Loss(torch.autograd.Function):
    """The three reductions; what is saved is told in the module's docstring. Of `_loss`'s
    arguments.
    """

    @staticmethod
    def forward(ctx: Any, keep: bool, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, coefficient, squared = inputs[:6]
        *setting, ctx.reduction = inputs[6:]
        ctx.setting, ctx.dtypes = setting, [t if t is None else t.dtype for t in inputs[:3]]
        ctx.keep, needed = keep, ctx.needs_input_grad[1:4]
        if ctx.reduction == "none":
            losses, logits = LOSSES(*inputs[:-1], keep)
            ctx.save_for_backward(*tensors, coefficient, squared)
            return losses, logits
        x, target = inputs[0], inputs[3]
        count = _count(target, setting[0]) if ctx.reduction == "mean" else None
        if count is not None:
            coefficient, squared = _averaged(coefficient, squared, target, count.to(wide(x)))
        shares, scale = [coefficient, squared], None
        if coefficient is not None:
            shares, scale = scaled(shares, x.dtype)
        losses, logits, *gradients = GRADIENTS(*tensors, *shares, *setting, keep, *needed)
        ctx.save_for_backward(*gradients, scale, *(inputs[:2] if keep else ()))
        total = losses.sum() if scale is None else (losses * scale).sum()
        # as eager: a mean of nothing is NaN, and has a gradient of zeros
        return total if count is None else torch.where(count == 0, torch.nan, total), logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_logits: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[1:4]
        if ctx.reduction == "none":
            *inputs, coefficient, squared = ctx.saved_tensors
            grad = grad.contiguous()
            scaled = [
                grad if coefficient is None else grad * coefficient,
                None if squared is None else grad * squared,
            ]
            found = list(GRADIENTS(*inputs, *scaled, *ctx.setting, False, *needed)[2:])
            operands = inputs[:2]
        else:
            *found, scale = ctx.saved_tensors[:4]
            operands = ctx.saved_tensors[4:]
            if scale is not None:
                grad = grad * scale
            found = [d * grad for d in found]
        if ctx.keep:
            x, weight = operands
            found = _added(found, grad_logits, x, weight, needed)
        kept = [
            d.to(dtype) if need else None
            for d, dtype, need in zip(found, ctx.dtypes, needed, strict=True)
        ]
        return (None, *kept, *(None,) * (len(ctx.setting) + 4))


def _added(
    found: Sequence[Tensor], grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x, weight and bias, with what comes through the logits [T, V]."""
    through: list[Callable[[], Tensor]] = [
        lambda: grad @ weight,
        lambda: grad.t() @ x,
        lambda: grad.sum(0),
    ]
    return [d + more() if need else d for d, more, need in zip(found, through, needed, strict=True)]


def _averaged(
    coefficient: Tensor | None, squared: Tensor | None, target: Tensor, count: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Shares of the rows in a mean over ``count`` of them: the gradients made in the forward are
    then the mean's own, and a backward that begins with 1 leaves them as they are.
    """
    share = torch.where(count == 0, 0.0, 1 / count)
    whole = share.expand(target.shape).contiguous() if coefficient is None else coefficient * share
    return whole, None if squared is None else squared * share


def scaled(
    shares: Sequence[Tensor | None], *dtypes: torch.dtype
) -> tuple[list[Tensor | None], Tensor | None]:
    """Shares of the rows with a greatest of 1, and what they are to be multiplied by again: the
    gradients, made before the loss's own is known, are then within float16's range, like those of
    a loss without shares. None beside other dtypes.
    """
    given = [share for share in shares if share is not None]
    if torch.float16 not in dtypes or not given or not given[0].numel():
        return list(shares), None
    greatest = torch.stack([share.abs().max() for share in given]).max()
    scale = torch.where((greatest > 0) & greatest.isfinite(), greatest, 1.0)
    return [share if share is None else share / scale for share in shares], scale


def _losses(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *rest_of, keep = rest
    logits = _kept(x, weight, keep)
    rows_of, setting = Rows(*rest_of[:2]), Setting(*rest_of[2:])
    kept = logits if keep else None
    return walk(x, weight, bias, target, rows_of, setting, kept=kept)[0], logits


def _losses_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0],), dtype=wide(x)), _kept(x, weight, rest[-1])


def _kept(x: Tensor, weight: Tensor, keep: bool) -> Tensor:
    """For the logits; empty where nobody keeps them."""
    return x.new_empty((x.shape[0], weight.shape[0]) if keep else (0,))


def _gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *rest_of, keep, of_x, of_weight, of_bias = rest
    rows_of, setting = Rows(*rest_of[:2]), Setting(*rest_of[2:])
    logits, needed = _kept(x, weight, keep), (of_x, of_weight, of_bias)
    kept = logits if keep else None
    losses, *found = walk(x, weight, bias, target, rows_of, setting, needed, kept)
    return losses, logits, *(x.new_empty((0,)) if d is None else d for d in found)


def _gradients_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    keep, x_grad, weight_grad, bias_grad = rest[-4:]
    nothing = (0,)
    return (
        x.new_empty((x.shape[0],), dtype=wide(x)),
        _kept(x, weight, keep),
        x.new_empty(x.shape if x_grad else nothing),
        weight.new_empty(weight.shape, dtype=accumulated(weight.dtype))
        if weight_grad
        else x.new_empty(nothing),
        x.new_empty((weight.shape[0],), dtype=wide(x)) if bias_grad else x.new_empty(nothing),
    )


library.compose("linear_cross_entropy", _linear_cross_entropy)
library.compose("linear_cross_entropy_and_logits", _and_logits)
library.implement(
    "linear_cross_entropy_losses",
    _losses,
    _losses_fake,
    launches=True,
    replays=True,
    multiplies=True,
)
library.implement(
    "linear_cross_entropy_gradients",
    _gradients,
    _gradients_fake,
    launches=True,
    replays=True,
    multiplies=True,
)
