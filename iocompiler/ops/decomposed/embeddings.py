"""The gradient of a table of few rows: a masked sum for each."""

from __future__ import annotations

import torch
from torch import Tensor

from iocompiler.ops import target
from iocompiler.ops.decomposed.arithmetic import DECLINED

aten = torch.ops.aten

# each row reads the gradient again, if only from the cache
_MOST_ROWS = 4


def embedding_dense_backward(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """``sum(where(indices == v, grad, 0))`` for every row v, on a GPU: no sort, no atomics."""
    few = isinstance(num_weights, int) and 0 < num_weights <= _MOST_ROWS
    if not few or scale_grad_by_freq or target.device_type(grad) != "cuda":
        return DECLINED
    width = grad.shape[-1]
    table = torch.arange(num_weights, device=grad.device).reshape(-1, 1, 1)
    read = indices.reshape(1, -1, 1) == table
    if 0 <= padding_idx < num_weights:
        read = read & (table != padding_idx)
    return torch.where(read, grad.reshape(1, -1, width), 0).sum(1)


DECOMPOSITIONS = {aten.embedding_dense_backward.default: embedding_dense_backward}
