"""The multiply-add that torch's own decompositions call, which only this import registers."""

from __future__ import annotations

import torch
import torch._inductor.inductor_prims

FMA = torch.ops.prims.fma.default
"""``FMA(a, b, c)`` is a b + c."""
