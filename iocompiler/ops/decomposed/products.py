"""Products without a sum: matrices of one column by matrices of one row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from iocompiler.ops.decomposed.arithmetic import DECLINED

aten = torch.ops.aten


def outer(a: Tensor, b: Tensor) -> Tensor:
    """``a [..., M, 1] @ b [..., 1, N]`` elementwise (the angles of a rotary embedding): what reads
    it computes it.
    """
    dense = a.layout == b.layout == torch.strided
    if not dense or not statically_known_true(a.shape[-1] == 1):
        return DECLINED
    return (a * b).contiguous()


DECOMPOSITIONS = {aten.mm.default: outer, aten.bmm.default: outer}
