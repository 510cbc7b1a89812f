"""Casts of what is multiplied stand before what repeats its elements, not behind it."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.sizes import same_sizes

aten = torch.ops.aten
_MOVES = (
    aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.transpose.int,
    aten.permute.default, aten.contiguous.default,
)  # fmt: skip
_PRODUCTS = (
    aten.scaled_dot_product_attention.default, aten.matmul.default, aten.bmm.default,
    aten.baddbmm.default, aten.einsum.default,
)  # fmt: skip


def cast_early(gm: GraphModule) -> int:
    """``to(reshape(expand(unsqueeze(k, 2))), bfloat16)``, as autocast leaves repeated heads -->
    ``reshape(expand(unsqueeze(to(k, bfloat16), 2)))``.

    Fewer elements are cast, and recognisers of repeated heads see them. Every element is the same;
    in the backward those of one are summed in the narrow type, which products give them in. Where
    ``k`` is a narrow tensor that was widened, there is no cast at all.

    Returns:
        the number of casts moved.
    """
    found = {n: moves for n in view.calls(gm, aten.to.dtype) if (moves := _moves(n))}
    if not found:
        return 0
    regions, roots = view.regions(gm), view.roots(gm)
    written = view.written(gm, roots)
    sites = 0
    for node, moves in found.items():
        source = moves[-1].args[0]
        assert isinstance(source, Node)
        one_mode = len({regions[each] for each in (node, *moves)}) == 1
        if one_mode and not roots[source] & written:
            sites += _move(gm, node, moves, source)
    return sites


def _moves(cast: Node) -> list[Node]:
    """What moves the elements that are cast, last first, and nobody else reads; nothing where none
    are repeated.
    """
    if not _is_of_floats(cast) or not _is_multiplied(cast):
        return []
    moves: list[Node] = []
    at = cast.args[0]
    while isinstance(at, Node) and at.target in _MOVES and len(at.users) == 1 and not at.kwargs:
        moves.append(at)
        at = at.args[0]
    while moves and moves[-1].target is not aten.expand.default:
        moves.pop()
    return moves


def _is_multiplied(node: Node) -> bool:
    """Whether only products read it, transposed or not."""
    return bool(node.users) and all(
        user.target in _PRODUCTS or (user.target in _MOVES and _is_multiplied(user))
        for user in node.users
    )


def _is_of_floats(cast: Node) -> bool:
    given = [view.value(each) for each in (cast.args[0], cast) if isinstance(each, Node)]
    plain = len(given) == len(cast.args) == 2 and not cast.kwargs
    return plain and all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in given)


def _move(gm: GraphModule, cast: Node, moves: list[Node], source: Node) -> int:
    dtype = cast.args[1]
    before = _unwidened(source, dtype)
    first = before or rewrite.call(gm, aten.to.dtype, (source, dtype), {}, near=cast)
    new = first
    for move in reversed(moves):
        new = rewrite.call(gm, move.target, (new, *move.args[1:]), {}, near=cast)
    if not _is_as_good(new, cast, first):
        rewrite.erase(gm, new)
        return 0
    rewrite.bypass(gm, cast, new)
    return 1


def _is_as_good(new: Node, cast: Node, first: Node) -> bool:
    """Whether it lies as the result of the cast does, in memory of its own as that does."""
    mine, theirs, read = (view.tensors(each)[0] for each in (new, cast, first))
    alike = same_sizes(mine.stride(), theirs.stride())
    return alike and mine.untyped_storage()._cdata != read.untyped_storage()._cdata


def _unwidened(source: Node, dtype: object) -> Node | None:
    """What ``source`` is in ``dtype``, where it was that before it was widened."""
    before = source.args[0] if source.target is aten.to.dtype and len(source.args) == 2 else None
    if not isinstance(before, Node) or source.kwargs:
        return None
    narrow, wide = view.tensors(before)[0], view.tensors(source)[0]
    widened = torch.promote_types(narrow.dtype, wide.dtype) == wide.dtype
    return before if narrow.dtype == dtype and widened else None
