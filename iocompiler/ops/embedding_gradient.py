"""The gradient of an embedding table: what each token brings, added to the token's row.

    iocompiler::embedding_gradient(Tensor grad, Tensor indices, SymInt rows, int padding_idx)
    iocompiler::embedding_gradient_onto(Tensor base, Tensor grad, Tensor indices, int padding_idx)
    iocompiler::embedding_gradient_(Tensor(a!) base, Tensor grad, Tensor indices, int padding_idx)

The first begins with zeros. The others begin with a gradient there is (a table tied to a head has
the head's): the second leaves that as it is, the third, which the planner puts where it dies, reads
and writes the rows that tokens name and no others.

Sums are in float32, rounded once, of the same bits each time. Negative indices, those behind the
last row and ``padding_idx`` add to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iocompiler.ops import library
from iocompiler.ops.attempt import template_or
from iocompiler.ops.target import on_gpu

aten = torch.ops.aten

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
# tokens, and rows: places behind the last one are 32-bit numbers too
_MOST = 2**31 - 2**16
_WHAT = "the gradient of an embedding table"

GRADIENT = library.define(
    "embedding_gradient(Tensor grad, Tensor indices, SymInt rows, int padding_idx) -> Tensor",
    torch.Tag.pt2_compliant_tag,
)
ONTO = library.define(
    "embedding_gradient_onto(Tensor base, Tensor grad, Tensor indices, int padding_idx) -> Tensor",
    torch.Tag.pt2_compliant_tag,
)
INTO = library.define(
    "embedding_gradient_(Tensor(a!) base, Tensor grad, Tensor indices, int padding_idx) -> ()",
    torch.Tag.pt2_compliant_tag,
)


def _gradient(grad: Tensor, indices: Tensor, rows: int, padding_idx: int) -> Tensor:
    """[rows, D]: grad [*, D], indices [*], of any shape and strides."""
    grad, indices = _flat(grad, indices)

    def plain() -> Tensor:
        return _plain(grad, indices, rows, padding_idx).to(grad.dtype)

    def template() -> Tensor:
        table = grad.new_zeros((rows, grad.shape[1]))
        _launch(table, grad, indices, padding_idx, added=False)
        return table

    return template_or(_WHAT, template, plain) if _has_template(grad, indices, rows) else plain()


def _onto(base: Tensor, grad: Tensor, indices: Tensor, padding_idx: int) -> Tensor:
    """base [rows, D], plus the gradient, contiguous."""
    result = base.clone(memory_format=torch.contiguous_format)
    _into(result, grad, indices, padding_idx)
    return result


def _into(base: Tensor, grad: Tensor, indices: Tensor, padding_idx: int) -> None:
    """base [rows, D] becomes base plus the gradient; contiguous on a GPU."""
    grad, indices = _flat(grad, indices)

    def plain() -> None:
        base.copy_(_plain(grad, indices, base.shape[0], padding_idx) + base)

    if _has_template(grad, indices, base.shape[0]):
        template_or(_WHAT, lambda: _launch(base, grad, indices, padding_idx, added=True), plain)
    else:
        plain()


def _flat(grad: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """[T, D] with the elements of a row side by side, and [T] contiguous."""
    indices = indices.reshape(-1).contiguous()
    grad = grad.reshape(indices.shape[0], grad.shape[-1])
    return (grad if grad.stride(1) == 1 else grad.contiguous()), indices


def _has_template(grad: Tensor, indices: Tensor, rows: int) -> bool:
    fits = max(rows, indices.numel()) < _MOST
    return on_gpu(grad) and fits and grad.dtype in DTYPES and indices.dtype in INDEX_DTYPES


def _launch(table: Tensor, grad: Tensor, indices: Tensor, padding_idx: int, added: bool) -> None:
    # not before it runs: this imports Triton
    from iocompiler.runtime.embedding_gradient import accumulate

    accumulate(table, grad, indices, padding_idx, added=added)


def _plain(grad: Tensor, indices: Tensor, rows: int, padding_idx: int) -> Tensor:
    """In plain aten, not yet rounded."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    found: Tensor = aten.embedding_dense_backward(grad.to(wide), indices, rows, padding_idx, False)
    return found


def _gradient_fake(grad: Tensor, indices: Tensor, rows: int, padding_idx: int) -> Tensor:
    return grad.new_empty((rows, grad.shape[-1]))


def _onto_fake(base: Tensor, grad: Tensor, indices: Tensor, padding_idx: int) -> Tensor:
    return base.new_empty(base.shape)


def _into_fake(base: Tensor, grad: Tensor, indices: Tensor, padding_idx: int) -> None:
    return None


library.implement("embedding_gradient", _gradient, _gradient_fake, launches=True, replays=True)
library.implement("embedding_gradient_onto", _onto, _onto_fake, launches=True, replays=True)
library.implement("embedding_gradient_", _into, _into_fake, launches=True, replays=True)
