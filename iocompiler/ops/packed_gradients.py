"""`iocompiler::scored_attention_backward_packed`: the gradients of an attention's query, key and
value in one tensor, laid out as the result of the one projection that made all three.

Where they lie is a text, a `Packing`: its letters are the dims of [B, H, S, D].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iocompiler.ops import library
from iocompiler.ops.scored_attention import GIVEN, SAVED, Call

PACKED = library.define(
    f"scored_attention_backward_packed({SAVED}, {GIVEN}, str packing) -> Tensor"
)
DIMS = "bhsd"
"""The dims of query, key and value."""
PARTS = "qkv"


class Packing(NamedTuple):
    """How three tensors lie in a contiguous one, [*front, sum of the parts].

    Attributes:
        front: dims outside of the parts, outermost first; of equal sizes in all three.
        back: dims inside of each part, outermost first.
        parts: query, key and value in their order.

    Of a projection to [B, S, 3 * H * D]: "bs|hd:qkv"; where each head has its three side by side:
    "bsh|d:qkv".
    """

    front: str
    back: str
    parts: str

    @staticmethod
    @functools.lru_cache(maxsize=512)
    def parsed(text: str) -> Packing:
        order, _, parts = text.partition(":")
        front, _, back = order.partition("|")
        return Packing(front, back, parts)

    def __str__(self) -> str:
        return f"{self.front}|{self.back}:{self.parts}"

    def shape(self, given: Sequence[Tensor]) -> list[Any]:
        """That of the whole, for these query, key and value."""
        return [*_sizes(given[0], self.front), sum(prod(_sizes(x, self.back)) for x in given)]

    def slices(self, packed: Tensor, given: Sequence[Tensor]) -> list[Tensor]:
        """Where in ``packed`` the gradients of query, key and value lie, in the shapes of these."""
        of_part = dict(zip(PARTS, given, strict=True))
        whole = [prod(_sizes(of_part[part], self.back)) for part in self.parts]
        pieces = dict(zip(self.parts, torch.split(packed, whole, -1), strict=True))
        order = [(self.front + self.back).index(letter) for letter in DIMS]
        return [
            torch.unflatten(pieces[part], -1, _sizes(of_part[part], self.back)).permute(order)
            for part in PARTS
        ]


def _sizes(x: Tensor, letters: str) -> list[Any]:
    return [x.shape[DIMS.index(letter)] for letter in letters]


def _packed(grad: Tensor, out: Tensor, logsumexp: Tensor, *given: Any) -> Tensor:
    call, packing = Call(*given[:-1]), Packing.parsed(given[-1])
    packed = _packed_fake(grad, out, logsumexp, *given)
    results = packing.slices(packed, call.inputs)
    call.differentiate(grad, out, logsumexp, results)
    return packed


def _packed_fake(grad: Tensor, out: Tensor, logsumexp: Tensor, *given: Any) -> Tensor:
    call, packing = Call(*given[:-1]), Packing.parsed(given[-1])
    return call.query.new_empty(packing.shape(call.inputs))


library.implement("scored_attention_backward_packed", _packed, _packed_fake, launches=True)
