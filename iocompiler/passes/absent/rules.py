"""What an operator makes of operands that are not there: a table of rows, one an operator.

A gradient nobody supplies is no tensor of zeros but nothing at all, as in eager mode: what is
multiplied by it does not become NaN where the other factor is infinite. Backward graphs are linear
in their tangents, so nearly all of a graph that hangs on an absent one is itself absent.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import torch
import torch._prims  # registers what `torch.ops.prims` names
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from iocompiler.graph import view
from iocompiler.ops.fma import FMA
from iocompiler.ops.scored_attention import OPERAND

aten = torch.ops.aten
prims = torch.ops.prims

NOTHING = object()
"""The result is absent too."""

Verdict: TypeAlias = Any
"""`NOTHING`; the node the result equals, but for its dtype and broadcasting; or None: the operator
needs its operands.
"""
Rule: TypeAlias = Callable[[dict[str, Any], Collection[Node]], Verdict]
"""Called with the arguments by name and the absent nodes, one of which is among the arguments."""


def verdict(node: Node, absent: Collection[Node]) -> Verdict:
    """What the call ``node``, which reads something absent, comes to."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        # an item of nothing
        return NOTHING if target is operator.getitem and node.args[0] in absent else None
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, view.spelled_out(node), strict=True))
    rule = _RULES.get(target) or _RULES.get(target.overloadpacket)
    if rule is None and target._schema.name.endswith("_backward"):
        rule = _of_gradients
    return rule(given, absent) if rule is not None else None


def _of(*names: str) -> Rule:
    """Linear in the arguments so named, taken together."""

    def rule(given: dict[str, Any], absent: Collection[Node]) -> Verdict:
        return NOTHING if all(_missing(given[name], absent) for name in names) else None

    return rule


def _of_gradients(given: dict[str, Any], absent: Collection[Node]) -> Verdict:
    """An operator called ``..._backward`` is linear in what its schema calls a gradient."""
    gradients = [x for name, x in given.items() if name.startswith("grad") and _is_tensor(x)]
    return NOTHING if gradients and all(_missing(x, absent) for x in gradients) else None


def _first(given: dict[str, Any], absent: Collection[Node]) -> Verdict:
    """Linear in the first argument, and nothing else may be absent."""
    first, *rest = given.values()
    others = [x for x in tree_leaves(rest) if isinstance(x, Node)]
    if any(x in absent for x in others):
        return None
    return NOTHING if _missing(first, absent) else None


def _product(given: dict[str, Any], absent: Collection[Node]) -> Verdict:
    """Linear in each of the first two arguments."""
    return NOTHING if any(_gone(x, absent) for x in list(given.values())[:2]) else None


def _convolution(given: dict[str, Any], absent: Collection[Node]) -> Verdict:
    return _product(given, absent) if given["bias"] is None else None


def _sum(given: dict[str, Any], absent: Collection[Node]) -> Verdict:
    """``self + alpha * other``."""
    first, other = given["self"], given["other"]
    if _missing(first, absent) and _missing(other, absent):
        return NOTHING
    if _gone(other, absent) and isinstance(first, Node):
        return first
    plain = _gone(first, absent) and isinstance(other, Node) and given["alpha"] == 1
    return other if plain else None


def _difference(given: dict[str, Any], absent: Collection[Node]) -> Verdict:
    first, other = given["self"], given["other"]
    if _missing(first, absent) and _missing(other, absent):
        return NOTHING
    return first if _gone(other, absent) and isinstance(first, Node) else None


def _product_and_sum(*names: str) -> Rule:
    """A product of the first two of the arguments so named, plus the third."""

    def rule(given: dict[str, Any], absent: Collection[Node]) -> Verdict:
        one, two, added = (given[name] for name in names)
        if not (_gone(one, absent) or _gone(two, absent)) or given.get("beta", 1) != 1:
            return None
        if _missing(added, absent):
            return NOTHING
        return added if isinstance(added, Node) else None

    return rule


def _padded(given: dict[str, Any], absent: Collection[Node]) -> Verdict:
    return _first(given, absent) if given["value"] == 0 else None


def _put(given: dict[str, Any], absent: Collection[Node]) -> Verdict:
    """``self`` with ``values`` added in places (or written there)."""
    put = given.get("values", given.get("src", given.get("source")))
    if _missing(given["self"], absent) and _missing(put, absent):
        return NOTHING
    adds = given.get("accumulate", True) and given.get("alpha", 1) == 1
    return given["self"] if adds and _gone(put, absent) else None


def _gone(x: Any, absent: Collection[Node]) -> bool:
    return isinstance(x, Node) and x in absent


def _missing(x: Any, absent: Collection[Node]) -> bool:
    """Whether an argument adds nothing: it (or each of a list) is absent, or a constant zero."""
    if isinstance(x, (list, tuple)):
        return all(_missing(each, absent) for each in x)
    if isinstance(x, Node):
        return x in absent or _is_zero(x)
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x == 0


def _is_zero(node: Node) -> bool:
    if node.target in _ZEROS:
        return True
    if node.target in _FILLED:
        names = [a.name for a in node.target._schema.arguments]
        given = dict(zip(names, view.spelled_out(node), strict=True))
        value = given.get("fill_value", given.get("s"))
        return isinstance(value, (int, float)) and value == 0
    # the same zeros, seen or stored otherwise
    if node.target in _SAME and isinstance(node.args[0], Node):
        return _is_zero(node.args[0])
    return False


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Node) and isinstance(view.value(x), torch.Tensor)


_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
_FILLED = (
    aten.full.default,
    aten.full_like.default,
    aten.new_full.default,
    aten.scalar_tensor.default,
)
_SAME = (
    aten.expand.default,
    aten.view.default,
    aten.reshape.default,
    aten.clone.default,
    aten.alias.default,
    prims.convert_element_type.default,
)

# packets: every overload. fmt: off
_LINEAR = (
    aten.neg,
    aten.expand,
    aten.view,
    aten._unsafe_view,
    aten.reshape,
    aten.permute,
    aten.transpose,
    aten.t,
    aten.unsqueeze,
    aten.squeeze,
    aten.clone,
    aten.alias,
    aten.detach,
    aten.contiguous,
    aten._to_copy,
    prims.convert_element_type,
    aten.sum,
    aten.mean,
    aten.slice,
    aten.select,
    aten.as_strided,
    aten.diagonal,
    aten.unfold,
    aten.flip,
    aten.roll,
    aten.cumsum,
    aten.tril,
    aten.triu,
    aten.index,
    aten.gather,
    aten.index_select,
    aten.repeat,
    aten.split,
    aten.split_with_sizes,
    aten.unbind,
    aten.div,
    aten.real,
    aten.imag,
    aten.view_as_real,
    aten.view_as_complex,
    aten._conj,
    aten.embedding,
)
_PRODUCTS = (aten.mul, aten.mm, aten.bmm, aten.dot, aten.mv)
# fmt: on
_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_LINEAR, _first),
    **dict.fromkeys(_PRODUCTS, _product),
    aten.convolution.default: _convolution,
    aten.addmm.default: _product_and_sum("mat1", "mat2", "self"),
    aten.baddbmm.default: _product_and_sum("batch1", "batch2", "self"),
    FMA: _product_and_sum("a", "b", "c"),
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _difference,
    aten.constant_pad_nd.default: _padded,
    OPERAND: _of_gradients,
    aten.cat.default: _of("tensors"),
    aten.stack.default: _of("tensors"),
    aten.where.self: _of("self", "other"),
    aten.slice_scatter.default: _of("self", "src"),
    aten.select_scatter.default: _of("self", "src"),
    aten.index_put.default: _put,
    aten.scatter_add.default: _put,
    aten.index_add.default: _put,
}
