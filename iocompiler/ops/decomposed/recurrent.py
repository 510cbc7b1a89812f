"""The LSTM cell (Hochreiter and Schmidhuber, "Long short-term memory", 1997), pointwise operators.

On a GPU aten's cell is two contractions and one opaque kernel; taken apart, what follows can fuse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iocompiler.ops.decomposed.arithmetic import cast, wide

aten = torch.ops.aten


def lstm_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    cell: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten._thnn_fused_lstm_cell: gates [B, 4H] in the order i, f, g, o; cell [B, H].

    Returns:
        (hidden [B, H], cell [B, H], the gates after their functions [B, 4H]).
    """
    gates = wide(input_gates) + wide(hidden_gates)
    for bias in (input_bias, hidden_bias):
        if bias is not None:
            gates = gates + wide(bias)
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    new = f * wide(cell) + i * g
    hidden = cast(o * new.tanh(), hidden_gates.dtype)
    return hidden, cast(new, cell.dtype), cast(torch.cat([i, f, g, o], 1), hidden_gates.dtype)


def lstm_cell_backward(
    grad_hidden: Tensor | None,
    grad_new: Tensor | None,
    cell: Tensor,
    new: Tensor,
    gates: Tensor,
    has_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """aten._thnn_fused_lstm_cell_backward_impl: (of the gates, of the old cell, of a bias)."""
    if grad_hidden is None and grad_new is None:
        return None, None, None
    i, f, g, o = wide(gates).chunk(4, 1)
    bent = wide(new).tanh()
    grad_o, grad_c = torch.zeros_like(bent), torch.zeros_like(bent)
    if grad_hidden is not None:
        grad_o = wide(grad_hidden) * bent
        grad_c = wide(grad_hidden) * o * (1 - bent * bent)
    if grad_new is not None:
        grad_c = grad_c + wide(grad_new)
    parts = (
        grad_c * g * i * (1 - i),
        grad_c * wide(cell) * f * (1 - f),
        grad_c * i * (1 - g * g),
        grad_o * o * (1 - o),
    )
    grad = torch.cat(parts, 1)
    bias = cast(aten.sum.dim_IntList(grad, [0]), gates.dtype) if has_bias else None
    return cast(grad, gates.dtype), cast(grad_c * f, cell.dtype), bias


DECOMPOSITIONS = {
    aten._thnn_fused_lstm_cell.default: lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl.default: lstm_cell_backward,
}
