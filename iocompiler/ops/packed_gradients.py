"""`iocompiler::scored_attention_backward_packed`: the gradients of an attention's query, key and
value in one tensor, laid out as the result of the one projection that made all three.

Where they lie is a text, a `Packing`: its letters are the dims of [B, H, S, D].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from iocompiler.ops import library
from iocompiler.ops.scored_attention import GIVEN, SAVED, parted

PACKED = library.define(
    f"scored_attention_backward_packed({SAVED}, {GIVEN}, str packing) -> Tensor"
)
DIMS = "bhsd"
"""The dims of query, key and value."""
PARTS = "qkv"


class Shaped(Protocol):
    """A tensor, or what has the shape of one."""

    @property
    def shape(self) -> tuple[Any, ...]: ...


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

    def shape(self, given: Sequence[Shaped]) -> list[Any]:
        """That of the whole, for these query, key and value."""
        row = sum(prod(_sizes(x.shape, self.back)) for x in given)
        return [*_sizes(given[0].shape, self.front), row]

    def slices(self, packed: Tensor, given: Sequence[Shaped]) -> list[Tensor]:
        """Where in ``packed``, contiguous, the gradients of query, key and value lie, in the shapes
        of these.
        """
        begin = packed.storage_offset()
        found = _places(self, tuple([x.shape for x in given]))
        return [packed.as_strided(size, stride, begin + start) for size, stride, start in found]


class _Place(NamedTuple):
    """A part of a tensor, ``start`` elements behind its first."""

    size: tuple[Any, ...]
    stride: tuple[int, ...]
    start: int


@functools.lru_cache(maxsize=512)
def _places(packing: Packing, shapes: tuple[tuple[Any, ...], ...]) -> list[_Place]:
    """Those of query, key and value, of these shapes; kept, as a step asks for each layer's."""
    of_part = dict(zip(PARTS, shapes, strict=True))
    row = sum(prod(_sizes(shape, packing.back)) for shape in shapes)
    found: dict[str, _Place] = {}
    start = 0
    for part in packing.parts:
        shape = of_part[part]
        outer = _strides(_sizes(shape, packing.front), row)
        back = _sizes(shape, packing.back)
        stride = dict(zip(packing.front + packing.back, outer + _strides(back, 1), strict=True))
        found[part] = _Place(shape, tuple(stride[letter] for letter in DIMS), start)
        start += prod(back)
    return [found[part] for part in PARTS]


def _strides(sizes: list[Any], innermost: int) -> list[Any]:
    return [innermost * prod(sizes[place + 1 :]) for place in range(len(sizes))]


def _sizes(shape: tuple[Any, ...], letters: str) -> list[Any]:
    return [shape[DIMS.index(letter)] for letter in letters]


def _packed(*given: Any) -> Tensor:
    (saved, call), packing = parted(given[:-1]), Packing.parsed(given[-1])
    packed = _packed_fake(*given)
    call.differentiate(saved, packing.slices(packed, call.inputs))
    return packed


def _packed_fake(*given: Any) -> Tensor:
    (_, call), packing = parted(given[:-1]), Packing.parsed(given[-1])
    return call.query.new_empty(packing.shape(call.inputs))


library.implement("scored_attention_backward_packed", _packed, _packed_fake, launches=True)
