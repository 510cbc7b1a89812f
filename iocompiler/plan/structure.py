"""What of a graph a lowering depends on, as a value: equal layers have equal structures.

`lower` looks at the nodes its outputs are pulled from, down to what is loaded, and at the users
over which `space.propagate` carries the root's index. A `Structure` describes them all and holds no
node: nodes are numbered as the walk meets them. Nor does it say which element of its tensor a
random operator reads (the seed of its layer), only which of them read the same one.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from iocompiler.ops.random import UNIFORM
from iocompiler.plan.lowering import known_scalar
from iocompiler.plan.rules import is_elementwise
from iocompiler.plan.sizes import size_of
from iocompiler.plan.space import leads_into, root_of, same_shape
from iocompiler.plan.views import is_view, viewed

Structure: TypeAlias = tuple[Hashable, ...]
Element: TypeAlias = tuple[int, int]
"""The number of the node of a tensor, and the element's own."""

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class _Facts:
    """What one node is, apart from who its ``operands`` are, and which ``element`` of the first of
    them it reads, if it is one.
    """

    number: int
    operands: tuple[Node, ...]
    element: int | None = None


@dataclass(frozen=True)
class _Near:
    """Where `space.propagate` may carry an index from a node, if it and they are computed."""

    operands: tuple[Node, ...]
    users: tuple[Node, ...]


@dataclass
class Structures:
    """Structures of sets of nodes of one graph; what a node is, is looked up once."""

    order: Mapping[Node, int]
    _made: dict[Node, _Facts] = field(default_factory=dict)
    _loaded: dict[Node, _Facts] = field(default_factory=dict)
    _near: dict[Node, _Near] = field(default_factory=dict)
    _numbers: dict[Hashable, int] = field(default_factory=dict)

    def of(
        self, home: frozenset[Node], virtual: Container[Node], outputs: tuple[Node, ...]
    ) -> tuple[Structure, list[Node], tuple[Element, ...]]:
        """The structure `lower` would see, the node behind each of its numbers, and the elements
        that are read by number.
        """
        walk = _Walk(home, virtual)
        placed = [walk.number(n) for n in outputs]
        ordered = [walk.number(n) for n in sorted(home, key=lambda n: self.order[n])]
        carried = tuple(self._carried(walk, root_of(home, outputs, self.order)[0]))
        below = tuple(self._below(walk))
        return (tuple(placed), tuple(ordered), carried, below), walk.nodes, tuple(walk.elements)

    def _below(self, walk: _Walk) -> Iterator[tuple[int, ...]]:
        """A row for each node met: what it is and what it is made of, which is met by that."""
        for node in walk.nodes:
            facts = self._facts_made(node) if walk.inside(node) else self._facts_loaded(node)
            row = facts.number, *map(walk.number, facts.operands)
            yield row if facts.element is None else (*row, walk.place(row[1], facts.element))

    def _carried(self, walk: _Walk, root: Node) -> Iterator[tuple[int, ...]]:
        """A row for each node an index may be carried to from ``root``: it, and to which users from
        there; to which operands, `_below` tells.
        """
        met = {root: None}
        waiting = [root]
        while waiting:
            node = waiting.pop()
            near = self._nearby(node)
            users = [user for user in near.users if walk.leads_on(user)]
            yield walk.number(node), *map(walk.number, users)
            for other in (*users, *near.operands) if walk.inside(node) else users:
                if other not in met:
                    met[other] = None
                    waiting.append(other)

    def _facts_made(self, node: Node) -> _Facts:
        """What a view or a node that is computed is."""
        facts = self._made.get(node)
        if facts is None:
            operands, description = tuple(node.all_input_nodes), _described(node)
            if node.target is operator.getitem:  # a part of a split: the split is no value itself
                (split,) = operands
                operands, description = (
                    tuple(split.all_input_nodes),
                    description + _described(split),
                )
            element = node.args[1] if node.target is UNIFORM else None
            assert element is None or isinstance(element, int)
            facts = self._made[node] = _Facts(self._numbered(description), operands, element)
        return facts

    def _facts_loaded(self, node: Node) -> _Facts:
        """What a node read from memory, or a number handed in, is."""
        facts = self._loaded.get(node)
        if facts is None:
            value = node.meta.get("val")
            constant = known_scalar(node) if isinstance(value, torch.Tensor) else None
            number = self._numbered(("loaded", _value(value), repr(constant)))
            facts = self._loaded[node] = _Facts(number, ())
        return facts

    def _nearby(self, node: Node) -> _Near:
        near = self._near.get(node)
        if near is None:
            operands = (viewed(node),) if is_view(node) else _alike(node, node.all_input_nodes)
            users = (u for u in node.users if is_view(u) or _alike(u, (node,)))
            near = self._near[node] = _Near(operands, tuple(users))
        return near

    def _numbered(self, description: Hashable) -> int:
        return self._numbers.setdefault(description, len(self._numbers))


@dataclass
class _Walk:
    """The nodes met for one set; ``nodes`` grows while it is walked over."""

    home: frozenset[Node]
    virtual: Container[Node]
    nodes: list[Node] = field(default_factory=list)
    elements: dict[Element, int] = field(default_factory=dict)
    _numbers: dict[Node, int] = field(default_factory=dict)

    def place(self, number: int, element: int) -> int:
        """Of an element, among those met."""
        return self.elements.setdefault((number, element), len(self.elements))

    def number(self, node: Node) -> int:
        found = self._numbers.get(node)
        if found is None:
            found = self._numbers[node] = len(self.nodes)
            self.nodes.append(node)
        return found

    def computes(self, node: Node) -> bool:
        return node in self.home or node in self.virtual

    def inside(self, node: Node) -> bool:
        """Whether its operands count: it is computed, or it is a view of what may be."""
        return self.computes(node) or is_view(node)

    def leads_on(self, user: Node) -> bool:
        return leads_into(user, self.computes) if is_view(user) else self.computes(user)


def _alike(node: Node, operands: Iterable[Node]) -> tuple[Node, ...]:
    """Those operands whose elements lie where those of an elementwise ``node`` lie."""
    return tuple(n for n in operands if is_elementwise(node) and same_shape(n, node))


def _described(node: Node) -> tuple[Hashable, ...]:
    operands = {operand: i for i, operand in enumerate(node.all_input_nodes)}
    args = node.args if node.target is not UNIFORM else (node.args[0], *node.args[2:])
    arguments = _argument((args, node.kwargs), operands)
    return node.target, arguments, _value(node.meta.get("val"))


def _argument(given: Any, operands: Mapping[Node, int]) -> Hashable:
    """An argument, nodes in it by their place among the operands. Numbers as they are written: 1,
    1.0 and True, 0.0 and -0.0 are equal in Python.
    """
    if isinstance(given, Node):
        return "operand", operands[given]
    if isinstance(given, (list, tuple)):
        return tuple(_argument(g, operands) for g in given)
    if isinstance(given, dict):
        return tuple((key, _argument(g, operands)) for key, g in given.items())
    return given.node.expr if isinstance(given, _SYMBOLIC) else repr(given)


def _value(value: Any) -> Hashable:
    """All of a fake value that a lowering may look at."""
    if isinstance(value, torch.Tensor):
        strided = value.layout == torch.strided
        strides = tuple(map(size_of, value.stride())) if strided else value.layout
        return tuple(map(size_of, value.shape)), strides, value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(map(_value, value))
    return value.node.expr if isinstance(value, _SYMBOLIC) else repr(value)
