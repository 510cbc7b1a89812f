"""Symbolic integers as nodes of a graph: sums and products of the sizes it can name."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add, mul
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from iocompiler.graph import view
from iocompiler.passes.known_indices.affine import Integer

aten = torch.ops.aten


class Unspelled(Exception):
    """No node of the graph gives a part of the number."""


class Sizes:
    """Where a graph has its sizes: a node, and the dim where that is a tensor."""

    def __init__(self, gm: GraphModule, index: Node) -> None:
        self._places: dict[sympy.Expr, tuple[Node, int | None]] = {}
        for node in [index, *gm.graph.find_nodes(op="placeholder")]:
            value = view.value(node)
            if isinstance(value, torch.SymInt):
                self._places.setdefault(value.node.expr, (node, None))
            elif isinstance(value, torch.Tensor):
                shape: tuple[Any, ...] = tuple(value.shape)
                for dim, size in enumerate(shape):
                    if isinstance(size, torch.SymInt):
                        self._places.setdefault(size.node.expr, (node, dim))

    @property
    def nodes(self) -> list[Node]:
        return list(dict.fromkeys(node for node, _ in self._places.values()))

    def check(self, value: Integer) -> None:
        """Raise `Unspelled` where `speller` would."""
        _spelled(value, dict.fromkeys(self._places, 1))

    def speller(self, proxies: list[Any]) -> Callable[[Integer], Any]:
        """A function from integers to what an operator takes, given a proxy for each of `nodes`."""
        proxy = dict(zip(self.nodes, proxies, strict=True))

        def place(node: Node, dim: int | None) -> Any:
            return proxy[node] if dim is None else aten.sym_size.int(proxy[node], dim)

        return lambda value: _spelled(value, self._places, place)


def _spelled(value: Integer, places: Any, place: Callable[..., Any] | None = None) -> Any:
    if isinstance(value, int):
        return value
    return _expression(value.node.expr, places, place)


def _expression(expr: sympy.Expr, places: Any, place: Callable[..., Any] | None) -> Any:
    if expr.is_Integer:
        return int(expr)
    if expr in places:
        return place(*places[expr]) if place is not None else 1
    if not (expr.is_Add or expr.is_Mul):
        raise Unspelled(f"no node has the size {expr}")
    terms = [_expression(each, places, place) for each in expr.args]
    return reduce(add if expr.is_Add else mul, terms)
