"""Sizes found while the graph runs (how many elements a mask keeps): who finds them, who waits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_symbols

Symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)


def finders(graph: Graph) -> dict[sympy.Symbol, Node]:
    """The call that finds each size that is no input's."""
    known: set[sympy.Symbol] = set()
    found: dict[sympy.Symbol, Node] = {}
    for node in graph.nodes:
        symbols = symbols_of(node.meta.get("val"))
        if node.op == "call_function":
            found.update(dict.fromkeys(symbols - known, node))
        known |= symbols
    return found


def needed(node: Node, found: dict[sympy.Symbol, Node]) -> Iterable[Node]:
    """The calls that find the sizes ``node`` uses, in its result's shape or as numbers."""
    if not found:
        return
    symbols = symbols_of(node.meta.get("val"))
    for operand in node.all_input_nodes:
        symbols |= symbols_of(operand.meta.get("val"))
    yield from {found[s] for s in symbols if s in found and found[s] is not node}


def symbols_of(value: Any) -> set[sympy.Symbol]:
    """The symbols in the shapes of tensors and in numbers, in containers too."""
    if isinstance(value, torch.Tensor) and not value._has_symbolic_sizes_strides:
        return set()  # nearly always, and sooner seen than symbols are looked for
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return set().union(*map(symbols_of, value))
    return set(free_symbols(value)) if isinstance(value, (torch.Tensor, *Symbolic)) else set()
