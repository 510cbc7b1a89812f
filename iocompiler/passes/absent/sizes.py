"""Sizes of what is not there, from what is: the nodes that compute them, and whether there are
any.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import rewrite, view

aten = torch.ops.aten


def symbols_within(wanted: Iterable[Any], given: Iterable[Any]) -> bool:
    """Whether every symbol in the sizes of the values ``wanted`` is itself a value of ``given``, or
    a size of one.
    """
    needed = {symbol for size in _sizes(wanted) for symbol in _expr(size).free_symbols}
    return needed <= {_expr(size) for size in _sizes(given)}


def _sizes(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from value.shape if isinstance(value, torch.Tensor) else [value]


def _expr(size: Any) -> Any:
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(size) if isinstance(size, int) else sympy.S.NaN


class Sizes:
    """Nodes for symbolic sizes, made just before a node that needs them.

    Args:
        absent: the inputs that no size may be read from.
    """

    def __init__(self, gm: GraphModule, absent: Iterable[Node]) -> None:
        self._gm = gm
        self._symbols: dict[sympy.Symbol, tuple[Node, int | None]] = {}
        left_out = frozenset(absent)
        for node in gm.graph.find_nodes(op="placeholder"):
            found = view.value(node)
            if isinstance(found, torch.SymInt):
                self._symbols.setdefault(_expr(found), (node, None))
            elif isinstance(found, torch.Tensor) and node not in left_out:
                for dim, size in enumerate(found.shape):
                    self._symbols.setdefault(_expr(size), (node, dim))

    def known(self, size: Any) -> bool:
        """Whether `node` can make it."""
        return self._known(_expr(size))

    def node(self, size: Any, near: Node) -> Any:
        """A number, or a node standing before ``near``."""
        return size if isinstance(size, int) else self._make(_expr(size), near)

    def shape(self, value: torch.Tensor, near: Node) -> list[Any]:
        return [self.node(size, near) for size in value.shape]

    def _known(self, expr: Any) -> bool:
        if expr.is_Integer or expr in self._symbols:
            return True
        return isinstance(expr, (sympy.Add, sympy.Mul)) and all(map(self._known, expr.args))

    def _make(self, expr: Any, near: Node) -> Any:
        if expr.is_Integer:
            return int(expr)
        if expr in self._symbols:
            node, dim = self._symbols[expr]
            return node if dim is None else self._call(aten.sym_size.int, (node, dim), near)
        combine = operator.add if isinstance(expr, sympy.Add) else operator.mul
        first, *rest = (self._make(part, near) for part in expr.args)
        for part in rest:
            first = self._call(combine, (first, part), near)
        return first

    def _call(self, target: Any, arguments: Sequence[Any], near: Node) -> Node:
        return rewrite.call(self._gm, target, tuple(arguments), {}, near=near)
