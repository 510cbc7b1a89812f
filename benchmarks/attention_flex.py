"""What FlexAttention's user writes: (score_mod, mask_mod), a function of the inputs each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_plain import Inputs, buckets


def lower(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j <= i


def unmasked(given: Inputs) -> tuple[Any, Any]:
    return None, None


def causal(given: Inputs) -> tuple[Any, Any]:
    return None, lower


def softcap(given: Inputs) -> tuple[Any, Any]:
    return _capped, lower


def window(given: Inputs) -> tuple[Any, Any]:
    return None, lambda b, h, i, j: (j <= i) & (i - j < 512)


def _capped(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return 20.0 * torch.tanh(s / 20.0)


def alibi(given: Inputs) -> tuple[Any, Any]:
    slopes = given["slopes"]
    return lambda s, b, h, i, j: s + slopes[h] * (j - i), lower


def relative(given: Inputs) -> tuple[Any, Any]:
    table = given["table"]
    length = given["q"].shape[2]
    place = torch.arange(length, device=table.device)
    where = buckets(place[None, :] - place[:, None]).to(torch.int32)
    return lambda s, b, h, i, j: s + table[where[i, j], h], lower


def document(given: Inputs) -> tuple[Any, Any]:
    ids = given["ids"]
    return None, lambda b, h, i, j: (ids[b, i] == ids[b, j]) & (j <= i)


def mask(given: Inputs) -> tuple[Any, Any]:
    mask = given["mask"]
    return None, lambda b, h, i, j: mask[i, j]


def cached(given: Inputs) -> tuple[Any, Any]:
    position = given["position"]
    return None, lambda b, h, i, j: j <= position[i]


def sunk(out: Tensor, lse: Tensor, given: Inputs) -> Tensor:
    """The output where a sink is beside the scores of a row."""
    left = torch.sigmoid(lse - given["sink"][:, None])
    return (out * left[..., None]).to(out.dtype)
