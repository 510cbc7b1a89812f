"""The rows of two pieces of logits: the divergence of one from the other, the cross-entropy beside
it, and the gradients over both.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iocompiler.ops import linear_cross_entropy_walk as walk
from iocompiler.ops.attempt import template_or
from iocompiler.ops.linear_cross_entropy_rows import Rows, Setting, hard_rows
from iocompiler.ops.target import on_gpu

KINDS = ("logits", "probabilities", "log-probabilities")


@dataclass(frozen=True)
class Divergence:
    """Between q = softmax(scale * u), where u are the logits or ``tanh(inner * logits)`` of a
    `Setting`, and p, which the other tensor says:

        D = sum p (entropy * log p - log q),  or, reversed,  sum q (entropy * log q - log p)

    What has no weight (p, or q where reversed, is 0) adds 0, and so does a row without a share.

    Attributes:
        kind: of the other tensor: "logits" y (p is the softmax of ``outer * tanh(inner * y)`` where
            ``capped``, else of ``outer * y``), "probabilities" (which need not add up to 1) or
            "log-probabilities".
        entropy: 1 or 0, as a condition.
        spread: of probabilities as they are, without entropy: p is then
            ``(1 - spread) * p + spread / V``.
    """

    scale: float = 1.0
    kind: str = "logits"
    outer: float = 1.0
    inner: float = 1.0
    capped: bool = False
    entropy: bool = True
    reversed: bool = False
    spread: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError where the attributes do not go with each other."""
        plain = self.kind == "probabilities" and not (self.entropy or self.reversed)
        if self.kind not in KINDS or (self.spread and not plain):
            raise ValueError(f"no divergence: {self}")


@dataclass(frozen=True)
class Pair:
    """Some rows of logits and of what they are compared with.

    Attributes:
        logits: [rows, V], in rows that begin at multiples of `walk.ALIGNED` bytes.
        other: [rows, V], any rows of elements side by side.
        target: [rows] int64; None: there is no cross-entropy.
        share: [rows], what a row's divergence is multiplied by.
        losses: [rows], written.
        gradient: [rows, V or more], written, with zeros behind V: the logits' own memory; None.
        other_gradient: the same over ``other``, which is then logits of the same form.
    """

    logits: Tensor
    other: Tensor
    target: Tensor | None
    share: Tensor
    losses: Tensor
    gradient: Tensor | None = None
    other_gradient: Tensor | None = None


def evaluate(pair: Pair, rows: Rows, setting: Setting, divergence: Divergence) -> None:
    """Write the losses and the gradients of a pair."""
    if not on_gpu(pair.logits) or torch.float64 in (pair.logits.dtype, pair.other.dtype):
        return reference_rows(pair, rows, setting, divergence)
    return template_or(
        "a divergence",
        lambda: launch_rows(pair, rows, setting, divergence),
        lambda: reference_rows(pair, rows, setting, divergence),
    )


def launch_rows(pair: Pair, rows: Rows, setting: Setting, divergence: Divergence) -> None:
    """`reference_rows` by the Triton kernel."""
    logits, other, losses = pair.logits, pair.other, pair.losses
    gradients = (pair.gradient, pair.other_gradient)
    into, other_into = (
        place if d is None else d for place, d in zip((logits, other), gradients, strict=True)
    )
    coefficient = losses if rows.coefficient is None else rows.coefficient
    squared = losses if rows.squared is None else rows.squared
    target = losses if pair.target is None else pair.target
    tensors = (
        *(logits, other, into, other_into, target),
        *(coefficient, squared, pair.share, losses),
    )
    form = _Form(
        setting,
        divergence,
        logits.shape[1],
        (into.shape[1], other_into.shape[1]),
        (logits.stride(0), other.stride(0), into.stride(0), other_into.stride(0)),
        _is_wide(other),
        (pair.target is not None, rows.coefficient is not None, rows.squared is not None),
        (pair.gradient is not None, pair.other_gradient is not None),
        tuple([x.dtype for x in tensors]),
        logits.device,
    )
    _launch(form).run(logits.shape[0], *tensors)


def _is_wide(rows: Tensor) -> bool:
    """Whether what a thread reads at once begins where it should in all rows if it does in the
    first, and is memory of theirs at the end of the last.
    """
    size = rows.element_size()
    row, stride = -(-rows.shape[1] * size // walk.ALIGNED) * walk.ALIGNED, rows.stride(0) * size
    last = rows.storage_offset() * size + (rows.shape[0] - 1) * stride + row
    return stride % walk.ALIGNED == 0 and last <= rows.untyped_storage().nbytes()


_TENSORS = (
    *("logits", "other", "gradient", "other_gradient", "target"),
    *("coefficient", "squared", "share", "loss"),
)


class _Form(NamedTuple):
    """All of a launch but its memory.

    Attributes:
        widths, strides: of the rows of both gradients; of logits, other and both gradients.
        wide: whether the other's rows are read as the logits' are.
        has: whether there is a target, a coefficient, a squared.
        needed: which gradients are.
    """

    setting: Setting
    divergence: Divergence
    vocabulary: int
    widths: tuple[int, int]
    strides: tuple[int, int, int, int]
    wide: bool
    has: tuple[bool, bool, bool]
    needed: tuple[bool, bool]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device


@functools.lru_cache(maxsize=256)
def _launch(form: _Form) -> Any:
    # not before it runs: these import Triton
    from iocompiler.codegen.kernels.divergence import divergence_rows
    from iocompiler.runtime.template_launch import Launch

    setting, divergence = form.setting, form.divergence
    return Launch(
        divergence_rows,
        _TENSORS,
        vocabulary=form.vocabulary,
        width=form.widths[0],
        other_width=form.widths[1],
        row_stride=form.strides[0],
        other_stride=form.strides[1],
        gradient_stride=form.strides[2],
        other_gradient_stride=form.strides[3],
        ignore_index=setting.ignore_index,
        smoothing=setting.smoothing,
        outer=setting.outer,
        inner=setting.inner,
        scale=divergence.scale,
        other_outer=divergence.outer,
        other_inner=divergence.inner,
        spread=divergence.spread,
        CAPPED=setting.capped,
        OTHER_CAPPED=divergence.capped,
        KIND=KINDS.index(divergence.kind),
        ENTROPY=divergence.entropy,
        REVERSED=divergence.reversed,
        SPREAD=divergence.spread != 0.0,
        HARD=form.has[0],
        SMOOTHED=setting.smoothing != 0.0,
        SCALED=form.has[1],
        SQUARED=form.has[2],
        GRADIENT=form.needed[0],
        OTHER_GRADIENT=form.needed[1],
        ALIGNED=form.wide,
        **walk.of_two_rows(form.vocabulary, max(dtype.itemsize for dtype in form.dtypes[:2])),
    )


def reference_rows(pair: Pair, rows: Rows, setting: Setting, divergence: Divergence) -> None:
    """What the kernel `divergence_rows` computes, in plain aten."""
    wide = pair.losses.dtype
    vocabulary, share = pair.logits.shape[1], pair.share.to(wide)
    u, slope = _bounded(pair.logits.to(wide), setting.inner, setting.capped)
    loss, d = torch.zeros_like(share), torch.zeros_like(u)
    if pair.target is not None:
        loss, d = hard_rows(setting.outer * u, pair.target, rows, setting)
        dead = (pair.target == setting.ignore_index) & (rows.squared is None)
        d = torch.where(dead[:, None], 0.0, setting.outer * d)
    logq = torch.log_softmax(divergence.scale * u, 1)
    logp, p, other_slope = _other(pair.other.to(wide), divergence)
    entropy = 1.0 if divergence.entropy else 0.0
    if divergence.reversed:
        q = logq.exp()
        each = _weighted(q, entropy * logq - logp)
        soft = each.sum(1)
        of_logits = each - q * soft[:, None]
        of_other = p - q
    else:
        each = _weighted(p, entropy * logp - logq)
        soft = each.sum(1)
        of_logits = p.sum(1, keepdim=True) * logq.exp() - p
        of_other = each - p * soft[:, None]
    pair.losses.copy_(loss + torch.where(share == 0, 0.0, share * soft))
    share = share[:, None]
    if pair.gradient is not None:
        d = d + torch.where(share == 0, 0.0, share * divergence.scale * of_logits)
        pair.gradient[:, :vocabulary] = torch.where(d == 0, 0.0, d * slope)
        pair.gradient[:, vocabulary:] = 0.0
    if pair.other_gradient is not None:
        d = torch.where(share == 0, 0.0, share * divergence.outer * of_other * other_slope)
        pair.other_gradient[:, :vocabulary] = d
        pair.other_gradient[:, vocabulary:] = 0.0


def _bounded(y: Tensor, inner: float, capped: bool) -> tuple[Tensor, Tensor | float]:
    """The logits with their cap, and its derivative."""
    if not capped:
        return y, 1.0
    u = torch.tanh(inner * y)
    return u, inner * (1 - u * u)


def _other(y: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor | float]:
    """(log p, p, the derivative of the cap)."""
    if divergence.kind == "logits":
        u, slope = _bounded(y, divergence.inner, divergence.capped)
        logp = torch.log_softmax(divergence.outer * u, 1)
        return logp, logp.exp(), slope
    if divergence.kind == "log-probabilities":
        return y, y.exp(), 1.0
    if divergence.spread:
        y = (1 - divergence.spread) * y + divergence.spread / y.shape[1]
    return torch.log(y), y, 1.0


def _weighted(p: Tensor, x: Tensor) -> Tensor:
    return torch.where(p == 0, 0.0, p * x)
