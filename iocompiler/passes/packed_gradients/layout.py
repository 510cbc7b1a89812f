"""Where in a contiguous tensor the results of one call lie that it is put together of."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.sizes import known
from iocompiler.ops.packed_gradients import DIMS, PARTS, Packing
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import Axis, Dims, Group, flat, fresh, resolve, size
from iocompiler.passes.packed_gradients.pieces import ADD, CAT, SCATTERS, Piece, pieces, readers

aten = torch.ops.aten

_MOVES = frozenset(views.VIEWS) - {aten.expand.default, aten.slice.Tensor}
"""What has every element of its input once."""
_WRITES = (CAT, ADD, aten.clone.default)


class Otherwise(Exception):
    """It is not put together so that a `Packing` says how."""


class _Place(NamedTuple):
    """The axes of a part's memory, outermost first: those outside of the parts, those inside."""

    front: Group
    back: Group


class _Leaf(NamedTuple):
    """A result of a call, what its dims mean, and how it lies in memory."""

    call: Node
    number: int
    dims: Dims
    place: _Place


def packed(call: Node) -> tuple[Node, Packing] | None:
    """The tensor that the three gradients ``call`` returns are copied into, all that is read of
    them, and where in it they lie; None where there is none, or they lie as no `Packing` says.
    """
    apart = gradients(call)
    for root in _copies(apart[0]) if apart else []:
        try:
            return root, _packing(call, root)
        except Otherwise:
            continue
    return None


def gradients(call: Node) -> list[Node]:
    """Those of query, key and value; none where one of them is not read."""
    found = {n.args[1]: n for n in call.users if n.target is operator.getitem}
    if len(call.users) != len(PARTS) or len(found) != len(PARTS):
        return []
    return [found[number] for number in range(len(PARTS))]


def _copies(node: Node) -> list[Node]:
    """What is written on the way of ``node``'s elements while each has one reader, last first."""
    found: list[Node] = []
    while len(readers(node)) == 1:
        (node,) = readers(node)
        if node.target in _WRITES:
            found.append(node)
        elif node.target not in _MOVES and node.target not in SCATTERS:
            break
    return found[::-1]


def _packing(call: Node, root: Node) -> Packing:
    whole = view.tensors(root)[0]
    if not view.is_contiguous(whole):
        raise Otherwise
    dims = fresh(whole.shape)
    leaves = list(_leaves(root, dims, flat(dims), None))
    if any(leaf.call is not call for leaf in leaves):
        raise Otherwise
    numbers = [leaf.number for leaf in leaves]
    if sorted(numbers) != list(range(len(PARTS))):
        raise Otherwise
    orders = [letters(leaf.dims, leaf.place.front, leaf.place.back) for leaf in leaves]
    return packing(orders, "".join(PARTS[n] for n in numbers))


def _leaves(node: Node, dims: Dims, memory: Group, place: _Place | None) -> Iterator[_Leaf]:
    """The results of calls that ``node``, of these dims, is made of, in the order of memory.

    Args:
        memory: the axes of the whole, outermost first.
        place: of the part that ``node`` is; None for the whole.
    """
    while node.target in _MOVES:
        earlier = views.before(node, dims)
        if earlier is None:
            raise Otherwise
        node, dims = _only_read(node.args[0]), earlier
    if node.target is operator.getitem and place is not None:
        call, number = node.args
        yield _Leaf(call, number, dims, place)  # type: ignore[arg-type]
        return
    found = pieces(node)
    if found is None:
        raise Otherwise
    for piece in found.pieces:
        within = _within(piece, dims, found.dim, memory, place)
        yield from _leaves(_only_read(piece.node), within[0], memory, within[1])


def _only_read(node: object) -> Node:
    if not isinstance(node, Node) or len(readers(node)) != 1:
        raise Otherwise
    return node


def _within(
    piece: Piece, dims: Dims, dim: int, memory: Group, place: _Place | None
) -> tuple[Dims, _Place]:
    """The dims of a piece along ``dim`` of a tensor with ``dims``, and its place.

    The outermost axis of the dim is the one that is cut: what lies inside of it in memory is whole
    in each piece.
    """
    cut, *rest = resolve(dims[dim]) or (None,)
    before, inside = ((), memory) if place is None else place
    inside = resolve(inside)
    if cut not in inside or (place is not None and inside[0] is not cut):
        raise Otherwise
    at, inner, length = inside.index(cut), size(rest), piece.end - piece.start
    count = length // inner
    if not known(count * inner == length) or (piece.flat and rest):
        raise Otherwise
    left: Group = () if known(count == 1) else (Axis(count),)
    group = () if piece.flat else ((*left, *rest),)
    return (
        (*dims[:dim], *group, *dims[dim + 1 :]),
        _Place((*before, *inside[:at]), (*left, *inside[at + 1 :])),
    )


Order: TypeAlias = tuple[str, str]
"""The letters of a gradient's dims in the order they lie in outside and inside of its part."""


def letters(dims: Dims, front: Group, back: Group) -> Order:
    """Those of a gradient with these dims, whose memory has these axes; those of size 1 left out.

    Raises:
        Otherwise: the axes are not whole dims, one after the other.
    """
    groups = dict(zip(DIMS, map(resolve, dims), strict=True))
    waiting = {letter: group for letter, group in groups.items() if group}
    found = _taken(waiting, resolve(front)), _taken(waiting, resolve(back))
    if waiting:
        raise Otherwise
    return found


def _taken(waiting: dict[str, Group], axes: Group) -> str:
    """The dims that ``axes`` are, whole and one after the other; they wait no more."""
    letters = ""
    while axes:
        found = next((x for x, group in waiting.items() if axes[: len(group)] == group), None)
        if found is None:
            raise Otherwise
        letters += found
        axes = axes[len(waiting.pop(found)) :]
    return letters


def packing(orders: Sequence[Order], parts: str) -> Packing:
    """The one order of all parts: dims of size 1 go where others have them, else outside.

    Raises:
        Otherwise: they have not one order, or elements of a row would be stored one by one.
    """
    front, back = max(orders, key=lambda order: len("".join(order)))
    for order in orders:
        for whole, own in zip((front, back), order, strict=True):
            if [letter for letter in whole if letter in own] != list(own):
                raise Otherwise
    front = "".join(letter for letter in DIMS if letter not in front + back) + front
    if not back.endswith(DIMS[-1]):
        raise Otherwise
    return Packing(front, back, parts)
