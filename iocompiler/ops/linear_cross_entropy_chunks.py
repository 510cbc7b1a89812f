"""Linear + cross-entropy chunk by chunk: the logits of a chunk, their losses, their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What the logits of one chunk may take, in bytes: at a vocabulary of 128256 in bfloat16 these are
# 2048 rows: on an H200 1.13 x the three products alone, where 1024 rows took 1.21 and 4096 1.13.
SCRATCH_BYTES = 1 << 29
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
    rows_of: Rows,
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
        gradient = any(d is not None for d in (dx, dweight, dbias))
        _rows(logits, target[some], rows_of.part(some), losses[some], setting, gradient)
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
    logits: Tensor, target: Tensor, rows_of: Rows, losses: Tensor, setting: Setting, gradient: bool
) -> None:
    """Write the losses; with ``gradient``, turn the logits into theirs."""
    on_gpu = logits.is_cuda and logits.dtype != torch.float64
    run = launch_rows if on_gpu else reference_rows
    run(logits, target, rows_of, losses, setting, gradient)


def launch_rows(
    logits: Tensor, target: Tensor, rows_of: Rows, losses: Tensor, setting: Setting, gradient: bool
) -> None:
    """`reference_rows` by the Triton kernel; Triton keeps it compiled in its own cache on disk."""
    from iocompiler.codegen.kernels.cross_entropy import cross_entropy_rows

    rows, vocabulary = logits.shape
    if not rows:
        return
    block = min(4096, 1 << max(vocabulary - 1, 1).bit_length())
    coefficient, squared = rows_of.coefficient, rows_of.squared
    cross_entropy_rows[(rows,)](
        logits,
        target,
        losses if coefficient is None else coefficient,
        losses if squared is None else squared,
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
        SCALED=coefficient is not None,
        SQUARED=squared is not None,
        BLOCK=block,
        num_warps=16 if block == 4096 else 4,
    )


def reference_rows(
    logits: Tensor, target: Tensor, rows_of: Rows, losses: Tensor, setting: Setting, gradient: bool
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
    lse = torch.logsumexp(z, 1)
    cross = lse - (1 - setting.smoothing) * z.gather(1, label)[:, 0]
    if setting.smoothing:
        cross = cross - setting.smoothing * z.mean(1)
    hit = kept.to(losses.dtype)
    if rows_of.coefficient is not None:
        hit = torch.where(kept, rows_of.coefficient.to(losses.dtype), 0.0)
    loss, mass = torch.where(hit == 0, 0.0, hit * cross), hit
    if rows_of.squared is not None:
        share = rows_of.squared.to(losses.dtype)
        loss = loss + torch.where(share == 0, 0.0, share * lse * lse)
        mass = mass + torch.where(share == 0, 0.0, 2 * share * lse)
    losses.copy_(loss)
    if not gradient:
        return
    d = mass[:, None] * torch.exp(z - lse[:, None])
    hit = hit[:, None]
    if setting.smoothing:
        d -= hit * (setting.smoothing / vocabulary)
    d.scatter_add_(1, label, (setting.smoothing - 1.0) * hit)
    d *= slope
    ignored = ~kept if rows_of.squared is None else torch.zeros_like(kept)
    logits.copy_(torch.where(ignored[:, None], 0.0, d))
