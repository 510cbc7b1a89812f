"""Multi-tensor operators, one plain operator a tensor, so that the planner sees what it can fuse
and batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view
from iocompiler.graph.match import graph_pass

aten = torch.ops.aten
Element = Callable[..., Any]
"""Called with one element of every list (and what is no list as it is); computes one result."""

# operators that are one operator an element, by name
# fmt: off
_UNARY = (
    "abs", "acos", "asin", "atan", "ceil", "cos", "cosh", "erf", "erfc", "exp", "expm1", "floor",
    "log", "log10", "log1p", "log2", "neg", "reciprocal", "round", "rsqrt", "sigmoid", "sign",
    "sin", "sinh", "sqrt", "tan", "tanh", "trunc",
)
# fmt: on
_BINARY = {
    "add": aten.add.Tensor,
    "sub": aten.sub.Tensor,
    "mul": aten.mul.Tensor,
    "div": aten.div.Tensor,
}
_CLAMPS = {
    "maximum": (aten.maximum.default, "min"),
    "clamp_min": (aten.maximum.default, "min"),
    "minimum": (aten.minimum.default, "max"),
    "clamp_max": (aten.minimum.default, "max"),
}


@graph_pass(stage="flat")
def foreach(gm: GraphModule) -> int:
    """Every multi-tensor operator becomes one operator a tensor.

    Before::

        s = aten._foreach_mul.Scalar([a, b], 0.9); x = s[0]; y = s[1]

    After::

        x = aten.mul.Tensor(a, 0.9); y = aten.mul.Tensor(b, 0.9)

    Numbers kept in 0-dim CPU tensors (step counts) stay in one multi-tensor call where they are
    results of a graph for another device; what is computed from them there is expanded all the
    same, for kernels to do. Left whole: norms and maxima, which are one pass over everything
    already, and what has no plain form.
    """
    accelerated = _accelerated(gm)
    return sum(_expand(gm, node, accelerated) for node in view.calls(gm, *_ELEMENTS))


def _accelerated(gm: GraphModule) -> bool:
    return any(t.device.type != "cpu" for node in gm.graph.nodes for t in view.tensors(node))


def _expand(gm: GraphModule, node: Node, accelerated: bool) -> int:
    if any(user.target is not operator.getitem for user in node.users):
        return 0
    readers = {getitem: _readers(getitem, accelerated) for getitem in node.users}
    wanted = [getitem for getitem in readers if readers[getitem]]
    element = _ELEMENTS[node.target]

    def each(args: Any, named: Any) -> list[Any]:
        rows = [(_at(args, g.args[1]), _at(named, g.args[1])) for g in wanted]
        return [element(*row, *rest) for row, rest in rows]

    values = [view.value(getitem) for getitem in wanted]
    named = tuple(node.kwargs.values())
    made = rewrite.insert(gm, each, node.args, named, near=node, values=values)
    for getitem, new in zip(wanted, made, strict=True):
        for reader in readers[getitem]:
            reader.replace_input_with(getitem, new)
        rewrite.erase(gm, getitem)
    return 1


def _readers(getitem: Node, accelerated: bool) -> list[Node]:
    """Who reads the plain operator's result from now on."""
    readers = list(getitem.users)
    if accelerated and view.tensors(getitem)[0].device.type == "cpu":
        return [reader for reader in readers if not _leaves(reader)]
    return readers


def _leaves(reader: Node) -> bool:
    """True where the value becomes a result of the graph."""
    return reader.op == "output" or reader.target is aten.copy_.default


def _at(values: Sequence[Any], position: Any) -> list[Any]:
    return [value[position] if isinstance(value, (list, tuple)) else value for value in values]


def _with_alpha(target: Any) -> Element:
    def element(a: Any, b: Any, alpha: Any = 1) -> Any:
        return target(a, b) if _is(alpha, 1) else target(a, b, alpha=alpha)

    return element


def _clamp(target: Any, bound: str) -> Element:
    def element(a: Any, b: Any) -> Any:
        return aten.clamp.default(a, **{bound: b}) if isinstance(b, (int, float)) else target(a, b)

    return element


def _addcmul(a: Any, b: Any, c: Any, value: Any = 1) -> Any:
    product = b if _is(value, 1) else aten.mul.Tensor(b, value)
    return aten.add.Tensor(a, aten.mul.Tensor(product, c))


def _addcdiv(a: Any, b: Any, c: Any, value: Any = 1) -> Any:
    dividend = b if _is(value, 1) else aten.mul.Tensor(b, value)
    return aten.add.Tensor(a, aten.div.Tensor(dividend, c))


def lerp(a: Any, b: Any, weight: Any) -> Any:
    """From the end that is nearer, as aten does: exact at both ends."""
    way = aten.sub.Tensor(b, a)
    if isinstance(weight, (int, float)):
        if abs(weight) < 0.5:
            return aten.add.Tensor(a, aten.mul.Tensor(way, weight))
        return aten.sub.Tensor(b, aten.mul.Tensor(way, 1 - weight))
    near = aten.add.Tensor(a, aten.mul.Tensor(way, weight))
    far = aten.sub.Tensor(b, aten.mul.Tensor(way, aten.sub.Tensor(1, weight)))
    return aten.where.self(aten.lt.Scalar(aten.abs.default(weight), 0.5), near, far)


def _is(value: Any, number: float) -> bool:
    return isinstance(value, (int, float)) and value == number


def _elements() -> dict[Any, Element]:
    found: dict[Any, Element] = {}

    def all_of(name: str, element: Element) -> None:
        packet = getattr(aten, f"_foreach_{name}", None)
        for overload in packet.overloads() if packet is not None else ():
            if not overload.endswith("out"):
                found[getattr(packet, overload)] = element

    for name in _UNARY:
        all_of(name, getattr(aten, name).default)
    for name, target in _BINARY.items():
        all_of(name, _with_alpha(target))
    for name, (target, bound) in _CLAMPS.items():
        all_of(name, _clamp(target, bound))
    all_of("addcmul", _addcmul)
    all_of("addcdiv", _addcdiv)
    all_of("lerp", lerp)
    found[aten._foreach_pow.List] = aten.pow.Tensor_Tensor
    found[aten._foreach_pow.Scalar] = aten.pow.Tensor_Scalar
    found[aten._foreach_pow.ScalarList] = aten.pow.Tensor_Scalar
    found[aten._foreach_pow.ScalarAndTensor] = aten.pow.Scalar
    found[aten._foreach_copy.default] = lambda a, b, non_blocking=False: aten.copy.default(a, b)
    found[aten._foreach_zero.default] = aten.zeros_like.default
    # a tensor of numbers, one for each element of the lists, is no list
    for packet in (aten._foreach_addcmul, aten._foreach_addcdiv):
        found.pop(packet.Tensor, None)
    return found


_ELEMENTS = _elements()
