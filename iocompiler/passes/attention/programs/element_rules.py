"""What single operators make of an element: one rule an operator, by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch.fx import Node

from iocompiler.passes.attention.dims import views
from iocompiler.passes.attention.masks.places import At, whole
from iocompiler.passes.attention.programs.integers import Integers, NotExpressed
from iocompiler.tile.score_builder import ScoreBuilder


class Elements(Protocol):
    """Extracts elements of the tensors of a graph into the program ``build``."""

    build: ScoreBuilder
    integers: Integers

    def value(self, node: Any, at: At) -> int: ...

    def operand(self, node: Any, at: At) -> int: ...

    def literal(self, node: Any, literal: float) -> int: ...

    def cast(self, value: int, dtype: torch.dtype) -> int: ...

    def decided(self, node: Node, at: At) -> bool | None: ...


Rule: TypeAlias = Callable[[Elements, Node, At], int]


def _arguments(node: Node, count: int) -> Sequence[Any]:
    if len(node.args) < count:
        raise NotExpressed
    return node.args[:count]


def _unary(fn: str) -> Rule:
    def rule(elements: Elements, node: Node, at: At) -> int:
        value = elements.operand(node.args[0], at)
        if elements.build.type(value) != "float" and fn not in ("neg", "abs"):
            value = elements.cast(value, torch.float32)
        op = elements.build.ops[value]
        if op.fn == "where" and all(_is_literal(elements, x) for x in op.inputs[1:]):
            parts = [elements.build.map(fn, each) for each in op.inputs[1:]]
            return elements.build.map("where", op.inputs[0], *parts)
        return elements.build.map(fn, value)

    return rule


def _is_literal(elements: Elements, value: int) -> bool:
    return elements.build.literal(value) is not None


def apply(elements: Elements, fn: str, left: int, right: int) -> int:
    """Arithmetic, done in both branches of a choice between literals."""
    build = elements.build
    for place, (one, other) in enumerate(((left, right), (right, left))):
        op = build.ops[one]
        literals = op.fn == "where" and all(build.literal(x) is not None for x in op.inputs[1:])
        if literals and build.literal(other) is not None:
            parts = [
                build.map(fn, *((each, other) if place == 0 else (other, each)))
                for each in op.inputs[1:]
            ]
            return build.map("where", op.inputs[0], *parts)
    return build.map(fn, left, right)


def _binary(fn: str) -> Rule:
    def rule(elements: Elements, node: Node, at: At) -> int:
        left, right = (elements.operand(each, at) for each in _arguments(node, 2))
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if not isinstance(alpha, (int, float)) or node.kwargs.get("rounding_mode") is not None:
            raise NotExpressed
        if fn == "div":
            left, right = (elements.build.cast(each, "float") for each in (left, right))
        if alpha != 1:
            right = apply(elements, "mul", right, elements.build.const(alpha))
        if elements.build.type(left) == elements.build.type(right) == "bool":
            if fn not in ("mul", "add"):
                raise NotExpressed
            return elements.build.map("and" if fn == "mul" else "or", left, right)
        return apply(elements, fn, left, right)

    return rule


def _reversed(elements: Elements, node: Node, at: At) -> int:
    left, right = (elements.operand(each, at) for each in _arguments(node, 2))
    if len(node.args) > 2 or node.kwargs:
        raise NotExpressed
    return apply(elements, "sub", right, left)


def _comparison(fn: str) -> Rule:
    def rule(elements: Elements, node: Node, at: At) -> int:
        known = elements.decided(node, at)
        if known is not None:
            return elements.build.const(known)
        left, right = (elements.operand(each, at) for each in _arguments(node, 2))
        if elements.build.type(left) == "bool" and elements.build.type(right) == "int":
            left = elements.cast(left, torch.int64)
        return elements.build.map(fn, left, right)

    return rule


def _logic(fn: str) -> Rule:
    def rule(elements: Elements, node: Node, at: At) -> int:
        if views.dtype(node) != torch.bool:
            raise NotExpressed
        values = [elements.build.cast(elements.operand(x, at), "bool") for x in node.args]
        return elements.build.map(fn, *values)

    return rule


def _clamp(elements: Elements, node: Node, at: At) -> int:
    value = elements.operand(node.args[0], at)
    given = [*node.args[1:], None, None][:2]
    low, high = (
        given[0] if given[0] is not None else node.kwargs.get("min"),
        given[1] if given[1] is not None else node.kwargs.get("max"),
    )
    for bound, fn in ((low, "maximum"), (high, "minimum")):
        if bound is not None:
            value = apply(elements, fn, value, elements.operand(bound, at))
    return value


def _bound(fn: str) -> Rule:
    def rule(elements: Elements, node: Node, at: At) -> int:
        bound = elements.operand(_arguments(node, 2)[1], at)
        return apply(elements, fn, elements.operand(node.args[0], at), bound)

    return rule


def _same(elements: Elements, node: Node, at: At) -> int:
    return elements.operand(node.args[0], at)


def _relu(elements: Elements, node: Node, at: At) -> int:
    value = elements.operand(node.args[0], at)
    return elements.build.map("maximum", value, elements.build.const(0.0))


def _power(elements: Elements, node: Node, at: At) -> int:
    if node.args[1] != 2:
        raise NotExpressed
    value = elements.operand(node.args[0], at)
    return elements.build.map("mul", value, value)


def _where(elements: Elements, node: Node, at: At) -> int:
    condition, then, other = (elements.operand(each, at) for each in _arguments(node, 3))
    build = elements.build
    if all(build.type(each) == "bool" for each in (then, other)):
        kept = build.map("and", condition, then)
        return build.map("or", kept, build.map("and", build.map("logical_not", condition), other))
    return build.map("where", build.cast(condition, "bool"), then, other)


def _masked_fill(elements: Elements, node: Node, at: At) -> int:
    source, condition, value = (elements.operand(each, at) for each in _arguments(node, 3))
    value = elements.cast(value, views.dtype(node))
    return elements.build.map("where", condition, value, source)


def _triangle(sign: int) -> Rule:
    def rule(elements: Elements, node: Node, at: At) -> int:
        diagonal = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
        inside = whole(diagonal)
        if inside is None:
            raise NotExpressed
        i, j = (elements.integers.affine(at[place]) for place in (-2, -1))
        offset = elements.integers.affine(inside)
        i = elements.build.map("add", i, offset)
        kept = elements.build.map("le" if sign > 0 else "ge", j, i)
        value = elements.value(node.args[0], at)
        if elements.build.type(value) == "bool":
            return elements.build.map("and", kept, value)
        none = elements.literal(node, 0.0)
        return elements.build.map("where", kept, value, none)

    return rule


RULES: dict[str, Rule] = {
    **{name: _unary(name) for name in ("neg", "abs", "exp", "tanh", "sigmoid", "sqrt", "log")},
    **{name: _binary(name) for name in ("add", "sub", "mul", "div")},
    **{name: _comparison(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{name: _logic("and") for name in ("logical_and", "bitwise_and", "__and__")},
    **{name: _logic("or") for name in ("logical_or", "bitwise_or", "__or__")},
    **{name: _logic("logical_not") for name in ("logical_not", "bitwise_not")},
    "positive": _same,
    "rsub": _reversed,
    "clamp": _clamp,
    "clamp_min": _bound("maximum"),
    "clamp_max": _bound("minimum"),
    "maximum": _bound("maximum"),
    "minimum": _bound("minimum"),
    "relu": _relu,
    "pow": _power,
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangle(1),
    "triu": _triangle(-1),
}
"""Operators by name."""
