"""Python numbers that change from call to call (a learning rate under a scheduler), spelled so that
they stay inputs.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.match import graph_pass
from iocompiler.ops.fma import FMA

aten = torch.ops.aten


@graph_pass
def float_inputs(gm: GraphModule) -> int:
    """A number that is an input multiplies or divides one tensor.

    Before::

        aten._foreach_add_.List([p, q], [dp, dq], alpha=-lr)

    After::

        aten.add_.Tensor(p, aten.mul.Tensor(dp, -lr)); aten.add_.Tensor(q, aten.mul.Tensor(dq, -lr))

    torch makes tensors of such numbers where a tensor may stand in their place. A number that is
    left anywhere else is a constant of the graph: Dynamo compiles another for each value, and gives
    up after a few.
    """
    sites = 0
    for node in list(view.calls(gm, *_EACH, *_SUMS, *_PRODUCTS, FMA)):
        if not any(isinstance(view.value(read), torch.SymFloat) for read in node.all_input_nodes):
            continue
        sites += _each(gm, node) if node.target in _EACH else _scaled(gm, node)
    return sites


def _each(gm: GraphModule, node: Node) -> int:
    """One call an element, in the order of the list: they are tensors of their own."""
    if any(user.target is not operator.getitem for user in node.users):
        return 0
    *given, last = node.args
    named = dict(node.kwargs)
    if _EACH[node.target] in _PRODUCTS:
        named["value"] = last
    else:
        given.append(last)
    made = []
    for at in range(len(node.args[0])):  # type: ignore[arg-type]
        row = tuple(x[at] if isinstance(x, (list, tuple)) else x for x in given)
        made.append(rewrite.call(gm, _EACH[node.target], row, named, near=node))
    for user in list(node.users):
        rewrite.bypass(gm, user, made[user.args[1]])  # type: ignore[index]
    if not node._erased:
        rewrite.erase(gm, node)
    return 1 + sum(_scaled(gm, each) for each in made)


def _scaled(gm: GraphModule, node: Node) -> int:
    """``alpha`` and ``value`` as products, as Dynamo's own multiply-adds."""
    if node.target is FMA:
        one, other, added = node.args
        product = rewrite.call(gm, aten.mul.Tensor, (one, other), {}, near=node)
        rewrite.respell(node, aten.add.Tensor, (product, added))
        return 1
    number = node.kwargs.get("alpha", node.kwargs.get("value"))
    if number is None:
        return 0
    first, second, *third = node.args
    product = rewrite.call(gm, aten.mul.Tensor, (second, number), {}, near=node)
    target = node.target
    if target in _PRODUCTS:
        target, inner = _PRODUCTS[target]
        product = rewrite.call(gm, inner, (product, *third), {}, near=node)
    rewrite.respell(node, target, (first, product))
    return 1


_SUMS = (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor)
# a + value * b / c: the sum, and what stands between b and c
_PRODUCTS = {
    aten.addcdiv.default: (aten.add.Tensor, aten.div.Tensor),
    aten.addcdiv_.default: (aten.add_.Tensor, aten.div.Tensor),
    aten.addcmul.default: (aten.add.Tensor, aten.mul.Tensor),
    aten.addcmul_.default: (aten.add_.Tensor, aten.mul.Tensor),
}


def _of_each() -> dict[Any, Any]:
    """Multi-tensor operators, and what each is of one element."""
    found: dict[Any, Any] = {}
    for suffix in ("", "_"):
        for name in ("add", "sub", "mul", "div"):
            packet = getattr(aten, f"_foreach_{name}{suffix}")
            plain = getattr(aten, f"{name}{suffix}").Tensor
            found |= {packet.Scalar: plain, packet.List: plain}
        for name in ("addcdiv", "addcmul"):
            packet = getattr(aten, f"_foreach_{name}{suffix}")
            found[packet.Scalar] = getattr(aten, f"{name}{suffix}").default
    return found


_EACH = _of_each()
