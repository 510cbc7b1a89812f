"""Tensors that are put together of others, however that is spelled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.sizes import known
from iocompiler.passes.attention.dims.views import shape

aten = torch.ops.aten

CAT, ADD = aten.cat.default, aten.add.Tensor
SCATTERS = (aten.select_scatter.default, aten.slice_scatter.default)
_ZEROS = (aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default)
_FULL = (aten.full.default, aten.full_like.default, aten.new_full.default)


def readers(node: Node) -> list[Node]:
    """Who reads elements of ``node``: not the zeros made in its likeness to put it into."""
    return [user for user in node.users if not _is_for(user, node)]


def _is_for(zeros: Node, node: Node) -> bool:
    if zeros.target not in _ZEROS or len(zeros.users) != 1:
        return False
    (user,) = zeros.users
    return user.target in SCATTERS and user.args[:2] == (zeros, node)


class Piece(NamedTuple):
    """What fills ``start`` to ``end`` along a dim; a ``flat`` one has not that dim."""

    node: Node
    start: Any
    end: Any
    flat: bool = False


class Pieces(NamedTuple):
    """All that a tensor is made of along ``dim``, in order."""

    dim: int
    pieces: tuple[Piece, ...]


def pieces(node: Node) -> Pieces | None:
    """What ``node`` puts together: by `cat`, or by sums of zeros into which slices are put (what
    autograd makes of a tensor that was indexed). None where it does not, or not all of it.
    """
    if node.target is CAT:
        return _of_cat(node)
    return _of_sum(node) if node.target is ADD else None


def _of_cat(node: Node) -> Pieces:
    tensors, dim = view.spelled_out(node)[:2]
    dim %= len(shape(node))
    found: list[Piece] = []
    start: Any = 0
    for each in tensors:
        end = start + shape(each)[dim]
        found.append(Piece(each, start, end))
        start = end
    return Pieces(dim, tuple(found))


def _of_sum(node: Node) -> Pieces | None:
    terms = list(_terms(node))
    put = [found for found in map(_put, terms) if found is not None]
    if len(put) != len(terms) or len({dim for dim, _ in put}) != 1:
        return None
    dim = put[0][0]
    ordered = _ordered([piece for _, piece in put], shape(node)[dim])
    return None if ordered is None else Pieces(dim, ordered)


def _terms(node: Node) -> Iterable[Any]:
    """What is added up, where nobody else reads the sums between."""
    one, other, alpha = view.spelled_out(node)
    if alpha != 1 or not isinstance(one, Node) or not isinstance(other, Node):
        yield node  # is no scatter
        return
    for each in (one, other):
        if each.target is ADD and len(each.users) == 1:
            yield from _terms(each)
        else:
            yield each


def _put(term: Node) -> tuple[int, Piece] | None:
    """The dim along which, and the piece, where all else is zero and nobody else reads it."""
    if term.target not in SCATTERS or len(term.users) != 1:
        return None
    into, source, dim, *place = view.spelled_out(term)
    dim %= len(shape(term))
    if not _is_zero(into):
        return None
    size = shape(term)[dim]
    if term.target is aten.select_scatter.default:
        start = _from_front(place[0], size)
        return None if start is None else (dim, Piece(source, start, start + 1, flat=True))
    start = _from_front(0 if place[0] is None else place[0], size)
    if start is None or place[2] != 1:
        return None
    return dim, Piece(source, start, start + shape(source)[dim])


def _from_front(place: Any, size: Any) -> Any:
    if isinstance(place, Node):
        place = view.value(place)
    return place if known(place >= 0) else place + size if known(place < 0) else None


def _is_zero(node: Any) -> bool:
    if not isinstance(node, Node):
        return False
    if node.target in _FULL:
        return bool(view.spelled_out(node)[1] == 0)
    return node.target in _ZEROS


def _ordered(put: list[Piece], size: Any) -> tuple[Piece, ...] | None:
    """The pieces by their places; None where some overlap, or do not fill the dim."""
    found: list[Piece] = []
    at: Any = 0
    while put:
        follows = [piece for piece in put if known(piece.start == at)]
        if len(follows) != 1:
            return None
        found += follows
        put.remove(follows[0])
        at = follows[0].end
    return tuple(found) if known(at == size) else None
