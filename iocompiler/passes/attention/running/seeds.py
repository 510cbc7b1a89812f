"""Seeds of the dropouts inside attention."""

from __future__ import annotations

import torch
from torch.fx import Node

from iocompiler.ops.random import SEEDS
from iocompiler.passes.attention.dims.arrange import Arranger

aten = torch.ops.aten


def drawn(arranger: Arranger, device: torch.device) -> Node:
    """One int64 from the device's generator."""
    return arranger.call(aten.select.int, arranger.call(SEEDS, 1, device), 0, 0)
