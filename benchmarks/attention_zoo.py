"""Attention written plainly, as users write it, one function a row; and what FlexAttention's user
writes instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iocompiler.tile.score import Empty, ScoreProgram
from iocompiler.tile.score_builder import ScoreBuilder

NEGATIVE = float("-inf")
Inputs = dict[str, Tensor]


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


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


def _above(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)


def _finished(s: Tensor, v: Tensor) -> Tensor:
    return s.softmax(-1) @ v


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _scores(q, k)
    return _finished(s.masked_fill(_above(s), NEGATIVE), v)


def _unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _finished(_scores(q, k), v)


def _explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As models hand over a mask that is causal, and do not say so."""
    at = torch.arange(q.shape[2], device=q.device)
    seen = (at[None, :] <= at[:, None])[None, None].expand(q.shape[0], 1, -1, -1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def _by_library(causal: bool) -> Callable[..., Tensor]:
    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attended


def _alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    s = _scores(q, k)
    place = torch.arange(s.shape[-1], device=s.device)
    s = s + slopes[:, None, None] * (place[None, :] - place[:, None])
    return _finished(s.masked_fill(_above(s), NEGATIVE), v)


def _softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = 20.0 * torch.tanh(_scores(q, k) / 20.0)
    return _finished(s.masked_fill(_above(s), NEGATIVE), v)


def _window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _scores(q, k)
    place = torch.arange(s.shape[-1], device=s.device)
    far = place[:, None] - place[None, :] >= 512
    return _finished(s.masked_fill(_above(s) | far, NEGATIVE), v)


def _sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    s = _scores(q, k)
    s = s.masked_fill(_above(s), NEGATIVE)
    beside = sink[None, :, None, None].expand(*s.shape[:-1], 1)
    return torch.cat([s, beside], -1).softmax(-1)[..., :-1] @ v


def _sunk(out: Tensor, lse: Tensor, given: Inputs) -> Tensor:
    left = torch.sigmoid(lse - given["sink"][:, None])
    return (out * left[..., None]).to(out.dtype)


def _sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _scores(q, k) - math.log(q.shape[2])
    return torch.sigmoid(s.masked_fill(_above(s), NEGATIVE)) @ v


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _cached(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    """A cache of static length, filled up to ``position``, that of each query."""
    seen = torch.arange(k.shape[2], device=k.device) <= position[:, None]
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, enable_gqa=True
    )


def _position(sizes: Sizes, device: str) -> Inputs:
    """The last of all places: as many keys are read as without a mask."""
    return {"position": torch.tensor([sizes.length - 1], device=device)}


def buckets(distance: Tensor) -> Tensor:
    """T5's bucket of a distance key - query, looking back only (Raffel et al., arXiv 1910.10683,
    section 2.1): 32 buckets, exact below 16, then logarithmic up to 128.
    """
    n = (-distance).clamp_min(0)
    large = 16 + (torch.log(n.float().clamp_min(1) / 16) / math.log(128 / 16) * 16).long()
    return torch.where(n < 16, n, large.clamp_max(31))


def _relative(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    s = _scores(q, k)
    place = torch.arange(s.shape[-1], device=s.device)
    found = torch.nn.functional.embedding(buckets(place[None, :] - place[:, None]), table)
    s = s + found.permute(2, 0, 1).unsqueeze(0)
    return _finished(s.masked_fill(_above(s), NEGATIVE), v)


def _document(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    s = _scores(q, k)
    other = ids[:, None, :, None] != ids[:, None, None, :]
    return _finished(s.masked_fill(other | _above(s), NEGATIVE), v)


def _block_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return _finished(_scores(q, k).masked_fill(~mask, NEGATIVE), v)


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


def _lower(b: ScoreBuilder) -> int:
    return b.map("le", b.index("j"), b.index("i"))


def _unmasked_program(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    return s, None


def _causal_program(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    return s, _lower(b)


def _alibi_program(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    distance = b.cast(b.map("sub", b.index("j"), b.index("i")), "float")
    slope = b.load(0, (b.index("h"),), "float")
    return b.map("add", s, b.map("mul", slope, distance)), _lower(b)


def _softcap_program(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    capped = b.map("tanh", b.map("mul", s, b.const(1 / 20.0)))
    return b.map("mul", capped, b.const(20.0)), _lower(b)


def _window_program(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    near = b.map("lt", b.map("sub", b.index("i"), b.index("j")), b.const(512))
    return s, b.map("and", _lower(b), near)


def _relative_program(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    place = b.map("add", b.map("sub", b.index("j"), b.index("i")), b.number(0))
    return b.map("add", s, b.load(0, (b.index("h"), place), "float")), _lower(b)


def _sigmoid_program(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    return b.map("sigmoid", s), _lower(b)


def _document_program(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    i, j = (b.load(0, (b.index("b"), b.index(x)), "int") for x in "ij")
    return s, b.map("and", b.map("eq", i, j), _lower(b))


def _mask_program(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    return s, b.load(0, (b.index("i"), b.index("j")), "bool")


def _cached_program(b: ScoreBuilder, s: int) -> tuple[int, int | None]:
    return s, b.map("le", b.index("j"), b.load(0, (b.index("i"),), "int"))


def lower(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j <= i


def _flex_unmasked(given: Inputs) -> tuple[Any, Any]:
    return None, None


def _flex_causal(given: Inputs) -> tuple[Any, Any]:
    return None, lower


def _flex_softcap(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return 20.0 * torch.tanh(s / 20.0)


def _flex_alibi(given: Inputs) -> tuple[Any, Any]:
    slopes = given["slopes"]
    return lambda s, b, h, i, j: s + slopes[h] * (j - i), lower


def _flex_relative(given: Inputs) -> tuple[Any, Any]:
    table = given["table"]
    length = given["q"].shape[2]
    place = torch.arange(length, device=table.device)
    where = buckets(place[None, :] - place[:, None]).to(torch.int32)
    return lambda s, b, h, i, j: s + table[where[i, j], h], lower


def _flex_document(given: Inputs) -> tuple[Any, Any]:
    ids = given["ids"]
    return None, lambda b, h, i, j: (ids[b, i] == ids[b, j]) & (j <= i)


def _flex_mask(given: Inputs) -> tuple[Any, Any]:
    mask = given["mask"]
    return None, lambda b, h, i, j: mask[i, j]


def _flex_cached(given: Inputs) -> tuple[Any, Any]:
    position = given["position"]
    return None, lambda b, h, i, j: j <= position[i]


def _none(sizes: Sizes, device: str) -> Inputs:
    return {}


CASES = (
    Case(
        "no mask",
        _unmasked,
        _none,
        _flex_unmasked,
        _unmasked_program,
        library=_by_library(causal=False),
    ),
    *(
        Case(
            name,
            plain,
            _none,
            _flex_causal,
            _causal_program,
            library=_by_library(causal=True),
        )
        for name, plain in (("causal", _causal), ("explicit causal mask", _explicit))
    ),
    Case("ALiBi", _alibi, _slopes, _flex_alibi, _alibi_program),
    Case("softcap", _softcap, _none, lambda given: (_flex_softcap, lower), _softcap_program),
    Case(
        "window 512",
        _window,
        _none,
        lambda given: (None, lambda b, h, i, j: (j <= i) & (i - j < 512)),
        _window_program,
    ),
    Case(
        "T5 bias",
        _relative,
        lambda sizes, device: {"table": torch.randn(32, sizes.heads, device=device).bfloat16()},
        _flex_relative,
        _relative_program,
        ("table",),
    ),
    Case(
        "sink",
        _sink,
        lambda sizes, device: {"sink": torch.randn(sizes.heads, device=device).bfloat16()},
        _flex_causal,
        _causal_program,
        ("sink",),
        end=_sunk,
    ),
    Case("sigmoid", _sigmoid, _none, None, _sigmoid_program, empty="weights"),
    Case("document", _document, _ids, _flex_document, _document_program),
    Case(
        "flat block butterfly 64",
        _block_mask,
        lambda sizes, device: {"mask": butterfly(sizes.length).to(device)},
        _flex_mask,
        _mask_program,
    ),
    *(
        Case(
            f"decode {queries} x 4 heads",
            _grouped,
            _none,
            _flex_unmasked,
            _unmasked_program,
            queries=queries,
            members=4,
        )
        for queries in (1, 4)
    ),
    Case(
        "decode 1 x 4 heads, static cache",
        _cached,
        _position,
        _flex_cached,
        _cached_program,
        queries=1,
        members=4,
    ),
)


def program(case: Case, width: int) -> ScoreProgram:
    """Our score program of a case."""
    build = ScoreBuilder()
    score = build.map("mul", build.score(), build.const(width**-0.5))
    return build.program(*case.program(build, score), empty=case.empty)
