"""Linear + cross-entropy chunk by chunk: the logits of a chunk, their losses, their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What the logits of one chunk may take, in bytes: at a vocabulary of 128256 in bfloat16 these are
# 1024 rows, enough for the matrix units, and half as much as the weight's gradient.
SCRATCH_BYTES = 1 << 28
_ROWS = 128  # chunks are multiples of this many rows
_LINE = 64  # rows of the scratch, and parts of an odd vocabulary, begin at multiples of this


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


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype the weight's gradient is summed in: unscaled sums may leave float16's range."""
    return torch.float32 if dtype == torch.float16 else dtype


def chunk_rows(rows: int, vocabulary: int, itemsize: int) -> int:
    """Rows of a chunk: as many as the scratch holds, then evened out over the chunks."""
    most = max(SCRATCH_BYTES // (_stride(vocabulary) * itemsize) // _ROWS, 1) * _ROWS
    chunks = -(-rows // most)
    return min(rows, -(-rows // max(chunks, 1) // _ROWS) * _ROWS)


def walk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor | None,
    setting: Setting,
    needed: Sequence[bool] | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(losses [T], dx, dweight, dbias), gradients only where ``needed`` says so.

    Args:
        x: [T, D]; weight: [V, D]; bias: [V]; target: [T] int64.
        factor: [T], the gradient of each row's loss; None: 1.
        needed: of x, weight, bias; None: only losses.
    """
    rows, vocabulary = x.shape[0], weight.shape[0]
    x, target = x.contiguous(), target.contiguous()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    losses = x.new_zeros((rows,), dtype=wide)
    dx, dweight, dbias = _empty_gradients(x, weight, wide, needed)
    chunk = chunk_rows(rows, vocabulary, x.element_size())
    scratch = x.new_empty((chunk, _stride(vocabulary)))
    parts = _parts(weight)
    for first in range(0, rows, max(chunk, 1)):
        some = slice(first, min(first + chunk, rows))
        logits = scratch[: some.stop - some.start, :vocabulary]
        _project(x[some], weight, bias, logits, parts)
        scale = None if factor is None else factor[some]
        _rows(logits, target[some], scale, losses[some], setting, dx, dweight, dbias)
        if dx is not None:
            _sum_over_vocabulary(logits, weight, dx[some], parts)
        if dweight is not None:
            _add_outer(logits, x[some], dweight, parts)
        if dbias is not None:
            dbias += logits.sum(0, dtype=wide)
    return losses, dx, dweight, dbias


def _empty_gradients(
    x: Tensor, weight: Tensor, wide: torch.dtype, needed: Sequence[bool] | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    of_x, of_weight, of_bias = needed or (False, False, False)
    shape = tuple(weight.shape)
    return (
        x.new_empty(x.shape) if of_x else None,
        weight.new_zeros(shape, dtype=accumulated(weight.dtype)) if of_weight else None,
        x.new_zeros(shape[:1], dtype=wide) if of_bias else None,
    )


def _stride(vocabulary: int) -> int:
    return -(-vocabulary // _LINE) * _LINE


def _parts(weight: Tensor) -> list[slice]:
    """The vocabulary, on a GPU as an aligned part and a tail (see `aligned_mm.py` for why)."""
    vocabulary = weight.shape[0]
    cut = vocabulary - vocabulary % _LINE
    whole = weight.device.type != "cuda" or weight.element_size() != 2
    if whole or vocabulary * weight.element_size() % 16 == 0 or not cut:
        return [slice(0, vocabulary)]
    return [slice(cut, vocabulary), slice(0, cut)]


def _project(
    x: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor, parts: list[slice]
) -> None:
    for part in parts:
        if bias is None:
            torch.mm(x, weight[part].t(), out=logits[:, part])
        else:
            torch.addmm(bias[part], x, weight[part].t(), out=logits[:, part])


def _sum_over_vocabulary(logits: Tensor, weight: Tensor, dx: Tensor, parts: list[slice]) -> None:
    """dx = logits @ weight; the tail first: what is rounded in between is then the smaller one."""
    for number, part in enumerate(parts):
        if number:
            dx.addmm_(logits[:, part], weight[part])
        else:
            torch.mm(logits[:, part], weight[part], out=dx)


def _add_outer(logits: Tensor, x: Tensor, dweight: Tensor, parts: list[slice]) -> None:
    for part in parts:
        if dweight.dtype == x.dtype:
            dweight[part].addmm_(logits[:, part].t(), x)
        else:
            dweight[part] += logits[:, part].t() @ x


def _rows(
    logits: Tensor,
    target: Tensor,
    factor: Tensor | None,
    losses: Tensor,
    setting: Setting,
    *gradients: Tensor | None,
) -> None:
    """Write the losses; if there are gradients, turn the logits into theirs."""
    gradient = any(d is not None for d in gradients)
    if logits.is_cuda and logits.dtype != torch.float64:
        launch_rows(logits, target, factor, losses, setting, gradient)
    else:
        reference_rows(logits, target, factor, losses, setting, gradient)


def launch_rows(
    logits: Tensor,
    target: Tensor,
    factor: Tensor | None,
    losses: Tensor,
    setting: Setting,
    gradient: bool,
) -> None:
    """`reference_rows` by the Triton kernel; Triton keeps it compiled in its own cache on disk."""
    from iocompiler.codegen.kernels.cross_entropy import cross_entropy_rows

    rows, vocabulary = logits.shape
    if not rows:
        return
    block = min(4096, 1 << max(vocabulary - 1, 1).bit_length())
    cross_entropy_rows[(rows,)](
        logits,
        target,
        losses if factor is None else factor,
        losses,
        vocabulary,
        logits.stride(0),
        setting.ignore_index,
        setting.smoothing,
        setting.outer,
        setting.inner,
        CAPPED=setting.capped,
        SMOOTHED=setting.smoothing != 0.0,
        GRADIENT=gradient,
        SCALED=factor is not None,
        BLOCK=block,
        num_warps=16 if block == 4096 else 4,
    )


def reference_rows(
    logits: Tensor,
    target: Tensor,
    factor: Tensor | None,
    losses: Tensor,
    setting: Setting,
    gradient: bool,
) -> None:
    """What the kernel `cross_entropy_rows` computes, in plain aten."""
    vocabulary = logits.shape[1]
    kept = target != setting.ignore_index
    z = logits.to(losses.dtype)
    if setting.capped:
        z = torch.tanh(setting.inner * z)
    slope = setting.outer * setting.inner * (1 - z * z) if setting.capped else setting.outer
    z = setting.outer * z
    label = torch.where(kept, target, 0)[:, None]
    lse = torch.logsumexp(z, 1, keepdim=True)
    loss = lse - (1 - setting.smoothing) * z.gather(1, label)
    if setting.smoothing:
        loss = loss - setting.smoothing * z.mean(1, keepdim=True)
    losses.copy_(torch.where(kept, loss[:, 0], 0.0))
    if not gradient:
        return
    d = torch.exp(z - lse)
    if setting.smoothing:
        d -= setting.smoothing / vocabulary
    d.scatter_add_(1, label, torch.full_like(label, setting.smoothing - 1.0, dtype=d.dtype))
    d *= slope
    if factor is not None:
        d *= factor[:, None]
    logits.copy_(torch.where(kept[:, None], d, 0.0))
