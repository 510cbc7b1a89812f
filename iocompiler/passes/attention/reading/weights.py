"""Weights of values that no softmax makes: a function of each score, as in sigmoid attention
(Ramapuram et al., arXiv 2409.04431) and squared ReLU attention (Hua et al., arXiv 2202.10447).

An MLP is the same arithmetic, and so are experts: what tells an attention is that its keys and
values are no parameters, but tensors of the same batch as the query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from iocompiler.ops.scored_attention import WIDEST
from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.dims.axes import Dims, flat, resolve
from iocompiler.passes.attention.reading import contraction, scores
from iocompiler.passes.attention.reading.constants import number
from iocompiler.passes.attention.reading.contraction import Contraction
from iocompiler.passes.attention.reading.description import Declined, Pointwise
from iocompiler.passes.attention.reading.scores import Scores

aten = torch.ops.aten
_GATES = {
    aten.sigmoid.default: "sigmoid",
    aten.relu.default: "relu",
    aten.clamp.default: "relu",
    aten.clamp_min.default: "relu",
}
"""Functions that make weights of scores, and what attention by them is called."""
_STEPS = frozenset(
    (
        *("add", "sub", "mul", "div", "neg", "abs", "exp", "pow", "square", "tanh", "sigmoid"),
        *("relu", "clamp", "clamp_min", "clamp_max", "maximum", "max", "where", "masked_fill"),
        *("to", "_to_copy"),
    )
)
"""Operators, by name, that scores go through."""
_MOST = 64
_MOST_JOINTS = 12
_SEEN_THROUGH = (*views.VIEWS, *views.CASTS, aten.dropout.default)


@dataclass(frozen=True)
class Weights:
    """``program`` ends with a function of the scores; ``path`` are views, casts and dropouts behind
    it, in the graph's order, ``name`` what it is called.
    """

    program: Scores
    path: tuple[Node, ...]
    name: str


def read(node: Node, second: Contraction, value: tuple[Node, Dims]) -> Weights | None:
    """The weights a node is in the contraction with the values; None where it is no attention's.

    Raises:
        Declined: it is one's, but with a dropout.
    """
    path: list[Node] = []
    while node.op == "call_function" and node.target in _SEEN_THROUGH:
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]
    if not _is_gated_product(node):
        return None
    try:
        program = scores.read(node)
    except Declined:
        return None  # a gate, a product of experts: nothing tells that it is an attention's
    if program is None or not _are_attention(program.contraction, second, value[0]):
        return None
    names = [_name(step) for step in program.steps if isinstance(step, Pointwise)]
    name = next((each for each in reversed(names) if each), "")
    if not name or second.node is program.contraction.node:
        return None
    for each in path:
        if each.target is aten.dropout.default and each.args[2] and number(each.args[1]):
            raise Declined("a dropout of weights that no softmax makes")
    return Weights(program, tuple(reversed(path)), name)


def _is_gated_product(node: Node) -> bool:
    """Whether a contraction and a gate are near behind a node: reading scores follows each way to
    them, of which a residual stream has too many.
    """
    seen: set[Node] = set()
    waiting, joints, gates, products = [node], 0, 0, 0
    while waiting:
        each = waiting.pop()
        if each in seen or each.op != "call_function":
            continue
        seen.add(each)
        if each.target in contraction.TARGETS:
            products += 1
        elif getattr(each.target, "_opname", "") in _STEPS or each.target in views.VIEWS:
            waiting += each.all_input_nodes
            joints += len(each.all_input_nodes) > 1
            gates += each.target in _GATES
        if len(seen) > _MOST or joints > _MOST_JOINTS:
            return False
    return bool(gates and products)


def _name(step: Pointwise) -> str:
    least = step.arguments[:1] == (0,) and step.arguments[1:] in ((), (None,))
    clamps = step.target in (aten.clamp.default, aten.clamp_min.default)
    return _GATES.get(step.target, "") if least or not clamps else ""


def _are_attention(first: Contraction, second: Contraction, value: Node) -> bool:
    """Whether the contractions are as narrow as heads, each within a batch, and of no parameter."""
    wide = not all(map(_is_narrow, (first.contracted.size, views.shape(value)[-1])))
    if wide or not _has_batch(first) or not _has_batch(second):
        return False
    return not any(map(_is_parameter, (first.left, first.right, value)))


def _has_batch(of: Contraction) -> bool:
    shared = set(flat(of.left_dims)).intersection(flat(of.right_dims))
    return bool(shared - set(resolve((of.contracted,))))


def _is_narrow(size: Any) -> bool:
    return not isinstance(size, int) or size <= WIDEST


def _is_parameter(node: Node) -> bool:
    while node.op == "call_function" and node.target in _SEEN_THROUGH:
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "get_attr" or bool(node.meta.get("parameter"))
