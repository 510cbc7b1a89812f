"""Python numbers that change from call to call (a learning rate, a momentum or Adam's betas under a
scheduler), spelled so that they stay inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.match import graph_pass
from iocompiler.ops.fma import FMA
from iocompiler.passes.foreach import lerp

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
    up after a few. Where an operator takes no tensor for it (a base, a weight, what fills), a one
    times the number is that tensor.
    """
    sites = 0
    for node in list(view.calls(gm, *_EACH, *_SUMS, *_PRODUCTS, *_SPELLINGS, FMA)):
        if not any(map(_is_input, node.all_input_nodes)):
            continue
        sites += _each(gm, node) if node.target in _EACH else _spelled(gm, node)
    return sites


def _is_input(value: Any) -> bool:
    """Whether it is a number that is one, or computed from one."""
    return isinstance(value, Node) and isinstance(view.value(value), torch.SymFloat)


def _each(gm: GraphModule, node: Node) -> int:
    """One call an element, in the order of the list: they are tensors of their own."""
    if any(user.target is not operator.getitem for user in node.users):
        return 0
    *given, last = node.args
    (count, *_) = (len(x) for x in node.args if isinstance(x, (list, tuple)))
    named = dict(node.kwargs)
    if _EACH[node.target] in _PRODUCTS:
        named["value"] = last
    else:
        given.append(last)
    made = []
    for at in range(count):
        row = tuple(x[at] if isinstance(x, (list, tuple)) else x for x in given)
        made.append(rewrite.call(gm, _EACH[node.target], row, named, near=node))
    for user in list(node.users):
        rewrite.bypass(gm, user, made[user.args[1]])  # type: ignore[index]
    if not node._erased:
        rewrite.erase(gm, node)
    return 1 + sum(_spelled(gm, each) for each in made)


def _spelled(gm: GraphModule, node: Node) -> int:
    spell = _SPELLINGS.get(node.target, _scaled)
    return spell(gm, node)


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


def _power(gm: GraphModule, node: Node) -> int:
    """A number to the power of a tensor."""
    base, exponent = node.args
    if not _is_input(base):
        return 0
    base = _tensor(gm, base, view.tensors(node)[0].dtype, node)
    rewrite.respell(node, aten.pow.Tensor_Tensor, (base, exponent))
    return 1


def _between(gm: GraphModule, node: Node) -> int:
    """Between two tensors, by a weight: no 16-bit float, which the operator on tensors asks for."""
    start, end, weight = node.args
    if not _is_input(weight):
        return 0
    wide = torch.promote_types(view.tensors(node)[0].dtype, torch.float32)
    weight = _tensor(gm, weight, wide, node)
    if node.target is aten.lerp.Scalar:
        rewrite.substitute(gm, node, lerp, start, end, weight)
    else:
        there = rewrite.insert(gm, lerp, start, end, weight, near=node)
        rewrite.respell(node, aten.copy_.default, (start, there))
    return 1


def _filled(gm: GraphModule, node: Node) -> int:
    """A tensor of ones, times the number."""
    at = _FILLS[node.target]
    number = node.args[at]
    if not _is_input(number) or not view.tensors(node)[0].is_floating_point():
        return 0
    given = (*node.args[:at], 1.0, *node.args[at + 1 :])
    ones = rewrite.call(gm, node.target, given, dict(node.kwargs), near=node)
    rewrite.respell(node, aten.mul.Tensor, (ones, number))
    return 1


def _tensor(gm: GraphModule, number: Any, dtype: torch.dtype, near: Node) -> Node:
    """The number as a tensor without dims."""
    settings = {"dtype": dtype, "device": view.tensors(near)[0].device}
    one = rewrite.call(gm, aten.full.default, ([], 1.0), settings, near=near)
    return rewrite.call(gm, aten.mul.Tensor, (one, number), {}, near=near)


# where the number stands among the arguments
_FILLS: dict[Any, int] = {
    aten.full_like.default: 1,
    aten.new_full.default: 2,
    aten.full.default: 1,
    aten.scalar_tensor.default: 0,
}
_SPELLINGS: dict[Any, Callable[[GraphModule, Node], int]] = {
    aten.pow.Scalar: _power,
    aten.lerp.Scalar: _between,
    aten.lerp_.Scalar: _between,
    **dict.fromkeys(_FILLS, _filled),
}
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
        found[getattr(aten, f"_foreach_lerp{suffix}").Scalar] = getattr(
            aten, f"lerp{suffix}"
        ).Scalar
    found[aten._foreach_pow.ScalarAndTensor] = aten.pow.Scalar
    return found


_EACH = _of_each()
