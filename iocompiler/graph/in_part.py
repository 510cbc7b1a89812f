"""Operators that write some places of their first argument, and leave the others."""

from __future__ import annotations

import torch

aten = torch.ops.aten

IN_PART = {
    aten.index_copy.default: (aten.index_copy_.default, 3),
    aten.index_put.default: (aten.index_put_.default, 2),
    aten.index_add.default: (aten.index_add_.default, 3),
    aten.index_fill.int_Scalar: (aten.index_fill_.int_Scalar, 3),
    aten.scatter.src: (aten.scatter_.src, 3),
    aten.scatter.value: (aten.scatter_.value, 3),
    aten.scatter_add.default: (aten.scatter_add_.default, 3),
    aten.scatter_reduce.two: (aten.scatter_reduce_.two, 3),
}
"""Those that make a tensor of their own, which is the first argument elsewhere; those that write
into it, which take the same arguments; and which of these has what is written."""
