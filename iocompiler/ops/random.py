"""Random numbers that can be made again: a few seeds are drawn, the numbers themselves are a pure
function of them.

    iocompiler::seeds(int n, Device device) -> Tensor
    iocompiler::uniform(Tensor seeds, int which, SymInt[] shape) -> Tensor

A backward pass reads the seeds and makes the same numbers again, so that no mask is ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iocompiler.ops import library
from iocompiler.tile import philox

SEEDS = library.define("seeds(int n, Device device) -> Tensor", torch.Tag.nondeterministic_seeded)
UNIFORM = library.define(
    "uniform(Tensor seeds, int which, SymInt[] shape) -> Tensor", torch.Tag.pt2_compliant_tag
)


def _seeds(n: int, device: torch.device) -> Tensor:
    """int64 [n], from the device's default generator: repeatable by ``torch.manual_seed``."""
    return torch.randint(2**63 - 1, (n,), dtype=torch.int64, device=device)


def _uniform(seeds: Tensor, which: int, shape: Sequence[int]) -> Tensor:
    """float32 in (0, 1) of ``shape``, of 16 random bits each: Philox2x32-7 under ``seeds[which]``,
    counter = the row-major position. Plain torch on every device, of the same bits as the generated
    kernels'.
    """
    count = 1
    for size in shape:
        count *= size
    return philox.uniform(seeds[which], torch.arange(count, device=seeds.device)).reshape(shape)


def _seeds_fake(n: int, device: torch.device) -> Tensor:
    return torch.empty((n,), dtype=torch.int64, device=device)


def _uniform_fake(seeds: Tensor, which: int, shape: Sequence[int]) -> Tensor:
    return seeds.new_empty(shape, dtype=torch.float32)


library.implement("seeds", _seeds, _seeds_fake)
library.implement("uniform", _uniform, _uniform_fake)
