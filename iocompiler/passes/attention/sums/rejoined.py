"""Sums with what is told apart by the rows and the columns of an image that queries and keys lie
in: ViTDet's positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.graph.sizes import known
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.reading import scores
from iocompiler.passes.attention.reading.description import NO_AXIS, Declined
from iocompiler.passes.attention.sums.joined import Joined
from iocompiler.passes.attention.sums.parts import check_place

aten = torch.ops.aten
_COPYING: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}
"""For views of what need not lie as the scores do."""


def rejoin(gm: GraphModule, last: Node) -> Joined:
    """Let what is added to scores whose dims are parted meanwhile be added to them as they were.

    Before: ``reshape(add(add(reshape(s, [b, y, x, v, u]), r), t), [b, n, k])``
    After: ``add(s, reshape(add(r, t), [b, n, k]))``

    Raises:
        Declined: anything else happens to them meanwhile, or they are parted for good.
    """
    whole = last
    while whole.target in (*views.CASTS, *views.COPIES):
        (whole,) = whole.all_input_nodes
    parted, terms = _sum(_stages(whole)[-1])
    before = next((n for n in _stages(parted)[1:] if views.alike(n, whole)), None)
    if not terms or before is None:
        raise Declined(NO_AXIS)
    check_place(gm, whole, [parted, before])
    total = _together(gm, terms, near=whole)
    calls = _calls(total, parted, whole)
    if calls is None:
        edit.erase(gm, total)
        raise Declined("how large scores are whose dims are parted is known at run time only")
    # no scores to who reads them: what is added may be made of products itself
    for target, rest in ((aten.positive.default, ()), *calls):
        total = edit.call(gm, target, (total, *rest), {}, near=whole)
    product = edit.call(gm, aten.add.Tensor, (before, total), {}, near=whole)
    whole.replace_all_uses_with(product)
    return Joined(whole, whole.args, product)


def _stages(node: Node) -> list[Node]:
    """The node and what it reshapes, step by step."""
    found = [node]
    while found[-1].target in views.RESHAPES:
        found.append(found[-1].args[0])  # type: ignore[arg-type]
    return found


def _sum(node: Node) -> tuple[Node, list[tuple[Node, bool]]]:
    """The scores that a sum is of, and the other terms in their order: each, and whether it is
    subtracted.
    """
    terms: list[tuple[Node, bool]] = []
    while node.target in scores.SUMS:
        sides: list[Any] = list(node.args[:2])
        places = [n for n, side in enumerate(sides) if views.is_tensor(side) and _is_scores(side)]
        subtracts = node.target is aten.sub.Tensor
        plain = len(node.args) == 2 and not node.kwargs and all(map(views.is_tensor, sides))
        if len(places) != 1 or not plain or (subtracts and places == [1]):
            raise Declined(NO_AXIS)
        terms.append((sides[1 - places[0]], subtracts))
        node = sides[places[0]]
    return node, terms[::-1]


def _is_scores(node: Node) -> bool:
    try:
        return scores.read(node) is not None
    except Declined:
        return False


def _together(gm: GraphModule, terms: Sequence[tuple[Node, bool]], *, near: Node) -> Node:
    """The terms in one."""
    (total, negative), *others = terms
    if negative:
        total = edit.call(gm, aten.neg.default, (total,), {}, near=near)
    for other, subtracts in others:
        target = aten.sub.Tensor if subtracts else aten.add.Tensor
        total = edit.call(gm, target, (total, other), {}, near=near)
    return total


def _calls(total: Node, parted: Node, whole: Node) -> list[tuple[Any, tuple[Any, ...]]] | None:
    """What reshapes a tensor that is broadcast against ``parted``, to be broadcast against
    ``whole``: each operator, and its arguments behind the tensor.
    """
    if views.alike(total, parted):
        back = _stages(whole)[-2::-1]
        if any(node.kwargs for node in back):
            return None
        return [(_COPYING.get(node.target, node.target), node.args[1:]) for node in back]
    shapes = (views.shape(each) for each in (total, parted, whole))
    sizes = _sizes(*shapes)
    return sizes and [(aten.expand.default, (sizes[0],)), (aten.reshape.default, (sizes[1],))]


def _sizes(
    own: Sequence[Any], parted: Sequence[Any], whole: Sequence[Any]
) -> tuple[list[int], list[int]] | None:
    """To what sizes a tensor that broadcasts against ``parted`` is expanded, and then reshaped, to
    broadcast against ``whole``: repeated only along dims that are not the same in both.
    """
    own = (*(1,) * (len(parted) - len(own)), *own)
    alike = takewhile(lambda d: known(parted[d] == whole[d]), range(min(len(parted), len(whole))))
    shared = {d for d in alike if known(own[d] == 1)}
    expanded = [1 if d in shared else n if known(own[d] == 1) else -1 for d, n in enumerate(parted)]
    reshaped = [1 if d in shared else n for d, n in enumerate(whole)]
    symbolic = [d for d, n in enumerate(reshaped) if not isinstance(n, int)]
    if len(symbolic) > 1 or any(not isinstance(n, int) for n in expanded):
        return None
    return expanded, [-1 if d in symbolic else n for d, n in enumerate(reshaped)]
