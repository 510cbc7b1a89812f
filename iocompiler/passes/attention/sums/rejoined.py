"""Sums with what is told apart by the rows and the columns of an image that queries and keys lie
in: ViTDet's positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite as edit
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.reading import scores
from iocompiler.passes.attention.reading.description import Declined
from iocompiler.passes.attention.sums.joined import Joined
from iocompiler.passes.attention.sums.parts import check_place

aten = torch.ops.aten


_COPYING: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}
"""For views of what is no tensor of its own."""
_NO_AXIS = "the softmax is over no single axis of the scores"


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
    end, back = _reshaped(whole)
    parted, terms = _sum(end)
    before = next((n.args[0] for n in _reshaped(parted)[1] if views.alike(n.args[0], whole)), None)
    if not terms or not isinstance(before, Node):
        raise Declined(_NO_AXIS)
    check_place(gm, whole, [parted, before])
    total = _together(gm, terms, parted, near=whole)
    # no scores to who reads them: what is added may be made of products itself
    total = edit.call(gm, aten.positive.default, (total,), {}, near=whole)
    for each in reversed(back):
        target = _COPYING.get(each.target, each.target)
        total = edit.call(gm, target, (total, *each.args[1:]), dict(each.kwargs), near=whole)
    product = edit.call(gm, aten.add.Tensor, (before, total), {}, near=whole)
    whole.replace_all_uses_with(product)
    return Joined(whole, whole.args, product)


def _reshaped(node: Node) -> tuple[Node, list[Node]]:
    """What a node reshapes, and the calls that do, the last one first."""
    calls: list[Node] = []
    while node.target in views.RESHAPES:
        calls.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, calls


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
            raise Declined(_NO_AXIS)
        terms.append((sides[1 - places[0]], subtracts))
        node = sides[places[0]]
    return node, terms[::-1]


def _is_scores(node: Node) -> bool:
    try:
        return scores.read(node) is not None
    except Declined:
        return False


def _together(
    gm: GraphModule, terms: Sequence[tuple[Node, bool]], like: Node, *, near: Node
) -> Node:
    """The terms in one, of the shape of ``like``."""
    (total, negative), *others = terms
    if negative:
        total = edit.call(gm, aten.neg.default, (total,), {}, near=near)
    for other, subtracts in others:
        target = aten.sub.Tensor if subtracts else aten.add.Tensor
        total = edit.call(gm, target, (total, other), {}, near=near)
    if views.alike(total, like):
        return total
    sizes: list[Any] = [
        n if isinstance(n, int) else edit.call(gm, aten.sym_size.int, (like, d), {}, near=near)
        for d, n in enumerate(views.shape(like))
    ]
    return edit.call(gm, aten.expand.default, (total, sizes), {}, near=near)
