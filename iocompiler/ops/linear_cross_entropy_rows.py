"""The rows of a piece of logits: their losses, their gradients, and a copy where one is kept."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iocompiler.ops import linear_cross_entropy_walk as walk
from iocompiler.ops.attempt import template_or
from iocompiler.ops.target import on_gpu


@dataclass(frozen=True)
class Setting:
    """``z = outer * tanh(inner * logits)`` where ``capped``, else ``outer * logits``; then the
    cross-entropy of z with label smoothing, rows with the target ``ignore_index`` left out.
    """

    ignore_index: int = -100
    smoothing: float = 0.0
    outer: float = 1.0
    inner: float = 1.0
    capped: bool = False


@dataclass(frozen=True)
class Rows:
    """A row's loss is ``coefficient * cross_entropy + squared * logsumexp^2``: [T] each, None for 1
    and for 0. Where one is 0, its summand is 0.
    """

    coefficient: Tensor | None = None
    squared: Tensor | None = None

    def part(self, some: slice) -> Rows:
        both = (self.coefficient, self.squared)
        return Rows(*(each if each is None else each[some].contiguous() for each in both))


@dataclass(frozen=True)
class Piece:
    """Some rows of logits, and where what is computed of them goes.

    Attributes:
        logits: [rows, V], in rows that begin at multiples of `walk.ALIGNED` bytes; or, with
            ``tails``, their first classes, a multiple of `walk.LINE`.
        target: [rows] int64.
        losses: [rows], written.
        gradient: [rows, V or more], written, with zeros behind V: the logits' own memory, or rows
            like theirs; None: none.
        copy: [rows, V], any rows; the logits are written there; None: nowhere.
        tails: [rows, the other classes] of logits that are copied and have no gradient, in rows of
            `walk.LINE` elements; None: there are none.
    """

    logits: Tensor
    target: Tensor
    losses: Tensor
    gradient: Tensor | None = None
    copy: Tensor | None = None
    tails: Tensor | None = None

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.logits.shape[1] + (0 if self.tails is None else self.tails.shape[1])


def evaluate(piece: Piece, rows: Rows, setting: Setting) -> None:
    """Write the losses, the gradient and the copy of a piece."""
    if not _has_template(piece.logits):
        return reference_rows(piece, rows, setting)
    return template_or(
        "a cross-entropy",
        lambda: launch_rows(piece, rows, setting),
        lambda: reference_rows(piece, rows, setting),
    )


def _has_template(logits: Tensor) -> bool:
    return on_gpu(logits) and logits.dtype != torch.float64


def launch_rows(piece: Piece, rows: Rows, setting: Setting) -> None:
    """`reference_rows` by the Triton kernel."""
    logits, losses = piece.logits, piece.losses
    gradient = logits if piece.gradient is None else piece.gradient
    copy = logits if piece.copy is None else piece.copy
    tails = logits if piece.tails is None else piece.tails
    coefficient = losses if rows.coefficient is None else rows.coefficient
    squared = losses if rows.squared is None else rows.squared
    tensors = (logits, tails, gradient, copy, piece.target, coefficient, squared, losses)
    form = _Form(
        setting,
        piece.vocabulary,
        logits.shape[1],
        gradient.shape[1],
        (_stride(logits), tails.stride(0), _stride(gradient), copy.stride(0)),
        (piece.tails is not None, piece.gradient is not None, piece.copy is not None),
        (rows.coefficient is not None, rows.squared is not None),
        tuple([x.dtype for x in tensors]),
        logits.device,
    )
    _launch(form).run(logits.shape[0], *tensors)


def _stride(rows: Tensor) -> int:
    """Of rows that begin at multiples of `walk.ALIGNED` bytes; any that says so where all of their
    classes are among the tails.
    """
    return rows.stride(0) if rows.shape[1] else walk.LINE


_TENSORS = ("logits", "tails", "gradient", "copy", "target", "coefficient", "squared", "loss")


class _Form(NamedTuple):
    """All of a launch but its memory.

    Attributes:
        cut: classes that are not among the tails.
        width: of the gradient's rows.
        strides: of the rows of logits, tails, gradient and copy.
        has: whether there are tails, a gradient, a copy.
        weighed: whether there is a coefficient, a squared.
    """

    setting: Setting
    vocabulary: int
    cut: int
    width: int
    strides: tuple[int, int, int, int]
    has: tuple[bool, bool, bool]
    weighed: tuple[bool, bool]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device


@functools.lru_cache(maxsize=256)
def _launch(form: _Form) -> Any:
    # not before it runs: these import Triton
    from iocompiler.codegen.kernels.cross_entropy import cross_entropy_rows
    from iocompiler.runtime.template_launch import Launch

    setting, (tails, gradient, copy) = form.setting, form.has
    return Launch(
        cross_entropy_rows,
        _TENSORS,
        vocabulary=form.vocabulary,
        cut=form.cut,
        width=form.width,
        row_stride=form.strides[0],
        tails_stride=form.strides[1],
        gradient_stride=form.strides[2],
        copy_stride=form.strides[3],
        ignore_index=setting.ignore_index,
        smoothing=setting.smoothing,
        outer=setting.outer,
        inner=setting.inner,
        CAPPED=setting.capped,
        NEGATED=setting.outer < 0,
        SMOOTHED=setting.smoothing != 0.0,
        TAILS=tails,
        GRADIENT=gradient,
        COPY=copy,
        SCALED=form.weighed[0],
        SQUARED=form.weighed[1],
        **walk.of_row(form.vocabulary, form.dtypes[0].itemsize, copied=copy, capped=setting.capped),
    )


def reference_rows(piece: Piece, rows: Rows, setting: Setting) -> None:
    """What the kernel `cross_entropy_rows` computes, in plain aten."""
    logits, losses = piece.logits, piece.losses
    if piece.tails is not None:
        logits = torch.cat([logits, piece.tails], 1)
    vocabulary = piece.vocabulary
    if piece.copy is not None:
        piece.copy.copy_(logits)
    z = logits.to(losses.dtype)
    if setting.capped:
        z = torch.tanh(setting.inner * z)
    slope = setting.outer * setting.inner * (1 - z * z) if setting.capped else setting.outer
    loss, d = hard_rows(setting.outer * z, piece.target, rows, setting)
    losses.copy_(loss)
    if piece.gradient is None:
        return
    d *= slope
    kept = piece.target != setting.ignore_index
    ignored = ~kept if rows.squared is None else torch.zeros_like(kept)
    piece.gradient[:, :vocabulary] = torch.where(ignored[:, None], 0.0, d)
    piece.gradient[:, vocabulary:] = 0.0


def hard_rows(z: Tensor, target: Tensor, rows: Rows, setting: Setting) -> tuple[Tensor, Tensor]:
    """(losses [rows], their gradient over z) of scaled and capped logits z [rows, V]."""
    kept = target != setting.ignore_index
    label = torch.where(kept, target, 0)[:, None]
    lse = torch.logsumexp(z, 1)
    cross = lse - (1 - setting.smoothing) * z.gather(1, label)[:, 0]
    if setting.smoothing:
        cross = cross - setting.smoothing * z.mean(1)
    hit = kept.to(z.dtype)
    if rows.coefficient is not None:
        hit = torch.where(kept, rows.coefficient.to(z.dtype), 0.0)
    loss, mass = torch.where(hit == 0, 0.0, hit * cross), hit
    if rows.squared is not None:
        share = rows.squared.to(z.dtype)
        loss = loss + torch.where(share == 0, 0.0, share * lse * lse)
        mass = mass + torch.where(share == 0, 0.0, 2 * share * lse)
    d = mass[:, None] * torch.exp(z - lse[:, None])
    hit = hit[:, None]
    if setting.smoothing:
        d -= hit * (setting.smoothing / z.shape[1])
    d.scatter_add_(1, label, (setting.smoothing - 1.0) * hit)
    return loss, d
