"""What an attention of the zoo is timed on."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.attention_zoo import Case, Sizes


def sizes(args: argparse.Namespace, case: Case) -> Sizes:
    if case.queries:
        return Sizes(1, 4, 512, 16) if args.quick else Sizes(8, 32, 16384, 128)
    return Sizes(1, 2, 256, 16) if args.quick else Sizes(4, 16, args.length, args.width)


def inputs(case: Case, size: Sizes, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """q, k, v that lie as a projection leaves them, [B, S, H, D], or k and v as in a cache, [B, H,
    S, D]; and the case's own.
    """
    torch.manual_seed(0)
    shape = (size.batch, size.length, size.heads, size.width)
    made = {
        name: torch.randn(shape, device=timing.device()).to(dtype).transpose(1, 2) for name in "qkv"
    }
    if case.queries:
        made["q"] = made["q"][:, :, -case.queries :].contiguous()
        made |= {name: made[name][:, :: case.members].contiguous() for name in "kv"}
    made |= case.extra(size, timing.device())
    for name in ("q", "k", "v", *case.learned):
        made[name].requires_grad_()
    return made
