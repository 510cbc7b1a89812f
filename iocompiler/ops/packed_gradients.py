"""`iocompiler::scored_attention_backward_packed`: the gradients of an attention's query, key and
value in one tensor, laid out as the result of the one projection that made all three.

Where they lie is a text, a `Packing`: its letters are the dims of [B, H, S, D].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from iocompiler.ops import library
from iocompiler.ops.scored_call import GIVEN, SAVED, parted

PACKED = library.define(
    f"scored_attention_backward_packed({SAVED}, {GIVEN}, str packing) -> Tensor"
)
DIMS = "bhsd"
"""The dims of query, key and value."""
Shape: TypeAlias = tuple[Any, ...]
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

    def shape(self, given: Sequence[Shape]) -> list[Any]:
        """That of the whole, for query, key and value of these shapes."""
        row = sum(prod(_sizes(shape, self.back)) for shape in given)
        return [*_sizes(given[0], self.front), row]

    @functools.lru_cache(maxsize=512)  # noqa: B019  # few, of a few words each
    def layout(self, given: tuple[Shape, ...]) -> Layout:
        """How they lie in it; kept, as a step asks for each layer's."""
        of_part = dict(zip(PARTS, given, strict=True))
        whole = self.shape(given)
        found: dict[str, _Place] = {}
        start = 0
        for part in self.parts:
            shape = of_part[part]
            outer = _strides(_sizes(shape, self.front), whole[-1])
            back = _sizes(shape, self.back)
            stride = dict(zip(self.front + self.back, outer + _strides(back, 1), strict=True))
            found[part] = _Place(shape, tuple(stride[letter] for letter in DIMS), start)
            start += prod(back)
        return Layout(whole, [found[part] for part in PARTS])


class _Place(NamedTuple):
    """A part of a tensor, ``start`` elements behind its first."""

    size: Shape
    stride: tuple[int, ...]
    start: int


class Layout(NamedTuple):
    """The shape of a tensor and the places of query, key and value in it."""

    shape: list[int]
    places: list[_Place]

    def slices(self, whole: Tensor) -> list[Tensor]:
        """Those of a tensor of this shape, contiguous."""
        begin = whole.storage_offset()
        return [whole.as_strided(size, stride, begin + at) for size, stride, at in self.places]


def _strides(sizes: list[Any], innermost: int) -> list[Any]:
    return [innermost * prod(sizes[place + 1 :]) for place in range(len(sizes))]


def _sizes(shape: tuple[Any, ...], letters: str) -> list[Any]:
    return [shape[DIMS.index(letter)] for letter in letters]


def _packed(*given: Any) -> Tensor:
    saved, call = parted(given[:-1])
    layout = Packing.parsed(given[-1]).layout(call.shapes)
    packed = call.query.new_empty(layout.shape)
    call.differentiate(saved, layout.slices(packed))
    return packed


def _packed_fake(*given: Any) -> Tensor:
    (_, call), packing = parted(given[:-1]), Packing.parsed(given[-1])
    return call.query.new_empty(packing.shape(call.shapes))


library.implement(
    "scored_attention_backward_packed", _packed, _packed_fake, launches=True, replays=True
)
