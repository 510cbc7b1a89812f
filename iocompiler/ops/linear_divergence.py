"""`iocompiler::linear_divergence`: a linear head's logits compared with another distribution, which
may be another head's; neither's logits are ever whole.

    z    = x @ weight.T + bias, and, where there is another weight, the other's logits likewise
    row  = share * divergence(z, other) + coefficient * cross_entropy(z, target) + squared * lse^2
    loss = row, or its sum

`linear_divergence_rows.Divergence` says which divergences there are, `Setting` how logits are
scaled and capped. Rows are worked off in chunks (`linear_divergence_chunks.py`); when gradients are
made is as `linear_cross_entropy.py` has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iocompiler.ops import library
from iocompiler.ops.linear_cross_entropy import scaled
from iocompiler.ops.linear_cross_entropy_head import accumulated
from iocompiler.ops.linear_cross_entropy_products import wide
from iocompiler.ops.linear_cross_entropy_rows import Setting
from iocompiler.ops.linear_divergence_chunks import Linear, walk
from iocompiler.ops.linear_divergence_rows import Divergence

_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor other, Tensor? other_weight, "
    "Tensor? other_bias, Tensor? target, Tensor? coefficient, Tensor? squared, Tensor share"
)
_SETTING = (
    "int ignore_index, float smoothing, float outer, float inner, bool capped, "
    "float scale, str kind, float other_outer, float other_inner, bool other_capped, "
    "bool entropy, bool reversed, float spread"
)
_NEEDED = (
    "bool x_grad, bool weight_grad, bool bias_grad, "
    "bool other_grad, bool other_weight_grad, bool other_bias_grad"
)
LINEAR_DIVERGENCE = library.define(
    f"linear_divergence({_INPUTS}, {_SETTING}, str reduction) -> Tensor"
)
LOSSES = library.define(f"linear_divergence_losses({_INPUTS}, {_SETTING}) -> Tensor")
GRADIENTS = library.define(
    f"linear_divergence_gradients({_INPUTS}, {_SETTING}, {_NEEDED}) "
    "-> (Tensor losses, Tensor dx, Tensor dweight, Tensor dbias, "
    "Tensor dother, Tensor dother_weight, Tensor dother_bias)"
)
_TENSORS, _HEADS, _SETTINGS = 10, 6, 5  # of the arguments: tensors, those of heads, of `Setting`


def _linear_divergence(*inputs: Any) -> Tensor:
    """Divergence of a linear head, and its cross-entropy.

    Args:
        x: [T, D], floating point. weight: [V, D]. bias: [V] or None.
        other: [T, C], with other_weight [V, C] and other_bias [V] or None: another head; or,
            without a weight, [T, V], as ``kind`` says, which is not differentiated.
        target: [T] int64 as in `iocompiler::linear_cross_entropy`; None: no cross-entropy.
        coefficient, squared, share: [T], not differentiated; None for 1 and for 0.
        then the numbers of `Setting` and `Divergence`; "sum" or "none".

    Returns:
        float32 (float64 where x is): one number, or [T] where the reduction is "none".
    """
    *given, reduction = inputs
    needed = [t is not None and t.requires_grad for t in inputs[:_HEADS]]
    needed[3] &= inputs[4] is not None
    if any(needed) and torch.is_grad_enabled():
        found: Tensor = _Loss.apply(*inputs)  # type: ignore[no-untyped-call]
        return found
    losses: Tensor = LOSSES(*given)
    return losses.sum() if reduction == "sum" else losses


class _Loss(torch.autograd.Function):
    """Both reductions: one number has its gradients made in the forward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        tensors, setting, reduction = inputs[:_TENSORS], inputs[_TENSORS:-1], inputs[-1]
        ctx.setting, ctx.summed = setting, reduction == "sum"
        ctx.dtypes = [t if t is None else t.dtype for t in inputs[:_HEADS]]
        ctx.needed = list(ctx.needs_input_grad[:_HEADS])
        ctx.needed[3] = ctx.needed[3] and inputs[4] is not None
        if not ctx.summed:
            ctx.save_for_backward(*tensors)
            losses: Tensor = LOSSES(*tensors, *setting)
            return losses
        shares, scale = list(tensors[_TENSORS - 3 :]), None
        if tensors[6] is None or shares[0] is not None:
            shares, scale = scaled(shares, inputs[0].dtype, inputs[3].dtype)
        losses, *gradients = GRADIENTS(*tensors[: _TENSORS - 3], *shares, *setting, *ctx.needed)
        ctx.save_for_backward(*gradients, scale)
        return losses.sum() if scale is None else (losses * scale).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.summed:
            *found, scale = ctx.saved_tensors
            grad = grad if scale is None else grad * scale
            found = [d * grad if need else d for d, need in zip(found, ctx.needed, strict=True)]
        else:
            *tensors, coefficient, squared, share = ctx.saved_tensors
            grad = grad.contiguous()
            shares = [
                grad if coefficient is None else grad * coefficient,
                None if squared is None else grad * squared,
                grad * share,
            ]
            if tensors[6] is None:
                shares[0] = None
            found = list(GRADIENTS(*tensors, *shares, *ctx.setting, *ctx.needed)[1:])
        kept = [
            d.to(dtype) if need else None
            for d, dtype, need in zip(found, ctx.dtypes, ctx.needed, strict=True)
        ]
        return *kept, *(None,) * (_TENSORS - _HEADS + len(ctx.setting) + 1)


def _heads(inputs: tuple[Any, ...]) -> tuple[Linear, Linear]:
    return Linear(*inputs[:3]), Linear(*inputs[3:_HEADS])


def _settings(inputs: tuple[Any, ...]) -> tuple[Setting, Divergence]:
    numbers = inputs[_TENSORS:]
    return Setting(*numbers[:_SETTINGS]), Divergence(*numbers[_SETTINGS:])


def _losses(*inputs: Any) -> Tensor:
    found = walk(*_heads(inputs), inputs[6], inputs[7:_TENSORS], *_settings(inputs))[0]
    assert found is not None
    return found


def _losses_fake(*inputs: Any) -> Tensor:
    x: Tensor = inputs[0]
    return x.new_empty((x.shape[0],), dtype=wide(x))


def _gradients(*inputs: Any) -> tuple[Tensor, ...]:
    given, needed = inputs[:-_HEADS], inputs[-_HEADS:]
    shares, settings = given[7:_TENSORS], _settings(given)
    found = walk(*_heads(given), given[6], shares, *settings, needed)
    return tuple(given[0].new_empty((0,)) if d is None else d for d in found)


def _gradients_fake(*inputs: Any) -> tuple[Tensor, ...]:
    needed = inputs[-_HEADS:]
    found = [_losses_fake(*inputs)]
    for head, some in zip(_heads(inputs), (needed[:3], needed[3:]), strict=True):
        shapes = (head.x, head.weight, head.bias)
        dtypes = (head.x.dtype, accumulated(head.x.dtype), wide(head.x))
        for like, dtype, need in zip(shapes, dtypes, some, strict=True):
            if need and like is not None:
                found.append(like.new_empty(like.shape, dtype=dtype))
            else:
                found.append(inputs[0].new_empty((0,)))
    return tuple(found)


library.compose("linear_divergence", _linear_divergence)
library.implement(
    "linear_divergence_losses", _losses, _losses_fake, launches=True, replays=True, multiplies=True
)
library.implement(
    "linear_divergence_gradients",
    _gradients,
    _gradients_fake,
    launches=True,
    replays=True,
    multiplies=True,
)
