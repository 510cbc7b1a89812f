"""Kinds of attention: as users write them, as FlexAttention's user does, as our score program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import attention_flex as flex
from benchmarks import attention_plain as plain
from benchmarks import attention_programs as programs
from benchmarks.attention_plain import Inputs
from iocompiler.tile.score import Empty, ScoreProgram
from iocompiler.tile.score_builder import ScoreBuilder


@dataclass(frozen=True)
class Sizes:
    """Batch, heads, length and head width."""

    batch: int
    heads: int
    length: int
    width: int


@dataclass(frozen=True)
class Case:
    """One kind of attention.

    Attributes:
        plain: of q, k, v [B, H, S, D] and the other inputs by name.
        extra: the other inputs, for sizes and a device.
        flex: (score_mod, mask_mod) for the inputs; None where it cannot be said so.
        program: our score program, for a sweep over tiles of the template alone.
        queries: so many meet keys of the whole length, as in decoding, forward only; 0: the length.
        members: query heads that share a key head.
        empty: of ``program``: "weights" where no softmax makes them.
        end: what FlexAttention's user makes of its output, its log-sum-exp and the inputs.
        library: the same by `scaled_dot_product_attention`, where its kernels need no mask for it.
    """

    name: str
    plain: Callable[..., Tensor]
    extra: Callable[[Sizes, str], Inputs]
    flex: Callable[[Inputs], tuple[Any, Any]] | None
    program: Callable[[ScoreBuilder, int], tuple[int, int | None]]
    learned: tuple[str, ...] = ()
    queries: int = 0
    members: int = 1
    end: Callable[[Tensor, Tensor, Inputs], Tensor] | None = None
    empty: Empty = "nan"
    library: Callable[..., Tensor] | None = None


def _position(sizes: Sizes, device: str) -> Inputs:
    """The last of all places: as many keys are read as without a mask."""
    return {"position": torch.tensor([sizes.length - 1], device=device)}


def butterfly(length: int, block: int = 64) -> Tensor:
    """The mask of a flat block butterfly (Chen et al., arXiv 2112.00029): the diagonal, one block
    at each distance that is a power of two, and the first column and row.
    """
    count = length // block
    place = torch.arange(count)
    apart = place[:, None] ^ place[None, :]
    mask = (apart & (apart - 1)) == 0
    mask[0, :] = True
    mask[:, 0] = True
    return mask.repeat_interleave(block, 0).repeat_interleave(block, 1)


def _slopes(sizes: Sizes, device: str) -> Inputs:
    powers = torch.arange(1, sizes.heads + 1, device=device) * (-8.0 / sizes.heads)
    return {"slopes": torch.exp2(powers).to(torch.bfloat16)}


def _ids(sizes: Sizes, device: str) -> Inputs:
    make = torch.Generator().manual_seed(0)
    cuts = torch.rand(sizes.batch, sizes.length, generator=make) < 8 / sizes.length
    return {"ids": cuts.cumsum(-1).to(device)}


def _none(sizes: Sizes, device: str) -> Inputs:
    return {}


CASES = (
    Case(
        "no mask",
        plain.unmasked,
        _none,
        flex.unmasked,
        programs.unmasked,
        library=plain.by_library(causal=False),
    ),
    *(
        Case(
            name,
            written,
            _none,
            flex.causal,
            programs.causal,
            library=plain.by_library(causal=True),
        )
        for name, written in (("causal", plain.causal), ("explicit causal mask", plain.explicit))
    ),
    Case("ALiBi", plain.alibi, _slopes, flex.alibi, programs.alibi),
    Case("softcap", plain.softcap, _none, flex.softcap, programs.softcap),
    Case("window 512", plain.window, _none, flex.window, programs.window),
    Case(
        "T5 bias",
        plain.relative,
        lambda sizes, device: {"table": torch.randn(32, sizes.heads, device=device).bfloat16()},
        flex.relative,
        programs.relative,
        ("table",),
    ),
    Case(
        "sink",
        plain.sink,
        lambda sizes, device: {"sink": torch.randn(sizes.heads, device=device).bfloat16()},
        flex.causal,
        programs.causal,
        ("sink",),
        end=flex.sunk,
    ),
    Case("sigmoid", plain.sigmoid, _none, None, programs.sigmoid, empty="weights"),
    Case("document", plain.document, _ids, flex.document, programs.document),
    Case(
        "flat block butterfly 64",
        plain.block_mask,
        lambda sizes, device: {"mask": butterfly(sizes.length).to(device)},
        flex.mask,
        programs.mask,
    ),
    *(
        Case(
            f"decode {queries} x 4 heads",
            plain.grouped,
            _none,
            flex.unmasked,
            programs.unmasked,
            queries=queries,
            members=4,
        )
        for queries in (1, 4)
    ),
    Case(
        "decode 1 x 4 heads, static cache",
        plain.cached,
        _position,
        flex.cached,
        programs.cached,
        queries=1,
        members=4,
    ),
)


def program(case: Case, width: int) -> ScoreProgram:
    """Our score program of a case."""
    build = ScoreBuilder()
    score = build.map("mul", build.score(), build.const(width**-0.5))
    return build.program(*case.program(build, score), empty=case.empty)
