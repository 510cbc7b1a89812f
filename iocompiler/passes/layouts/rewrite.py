"""The orders of storage that were chosen, written into the graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from iocompiler.graph import rewrite, view
from iocompiler.graph.sizes import same_sizes
from iocompiler.graph.storage_order import Order, lies_in, memory_format, order_of
from iocompiler.ops.laid_out import LAID_OUT
from iocompiler.passes.layouts.problem import Problem
from iocompiler.passes.layouts.rules import operands


class Rewriter:
    """Walks the graph once: operators get their operands in their order, all others as they were.

    What an operator really makes is read from its fake value, not from the labelling: where that
    is another order, its readers have it copied.

    Attributes:
        copies: what was put into the graph.
    """

    def __init__(self, gm: GraphModule, problem: Problem, labels: dict[Any, bool]) -> None:
        self._gm, self._problem, self._labels = gm, problem, labels
        self._regions = view.regions(gm)
        self._traced: dict[Node, Tensor] = {}  # of values whose strides are others now
        self._renewed: set[Node] = set()  # values that were computed again
        self._made: dict[tuple[Node, Order, bool], Node] = {}

    @property
    def copies(self) -> tuple[Node, ...]:
        return tuple(self._made.values())

    def run(self) -> None:
        for node in list(self._gm.graph.nodes):
            if node.op in ("call_function", "output"):
                self._visit(node)

    def _visit(self, node: Node) -> None:
        replaced = self._in_order(node) if node in self._problem.free else self._as_traced(node)
        if replaced:
            args, kwargs = map_arg((node.args, node.kwargs), lambda x: replaced.get(x, x))
            rewrite.respell(node, node.target, args, dict(kwargs))
        if node.op == "call_function" and self._renewed & {*node.all_input_nodes}:
            self._renew(node)

    def _in_order(self, node: Node) -> dict[Node, Node]:
        """Which operands are replaced by copies in the operator's order."""
        problem = self._problem
        given = operands(node, problem.free[node])
        order = Order.LAST if self._labels[node] else Order.FIRST
        if self._labels[node] == problem.before[node] and not self._traced.keys() & {*given}:
            return {}
        wrong = [x for x in given if not lies_in(view.value(x), order)]
        return {x: self._copy(x, order, node) for x in wrong}

    def _as_traced(self, node: Node) -> dict[Node, Node]:
        found: dict[Node, Node] = {}
        for each in node.all_input_nodes:
            if each in self._traced:
                order = order_of(self._traced[each])
                assert order is not None  # else it would not have been free
                found[each] = self._copy(each, order, node)
        return found

    def _copy(self, source: Node, order: Order, near: Node) -> Node:
        """In the region of its reader: made without grad it would have no gradient."""
        key = source, order, self._regions[near].grad
        if key not in self._made:
            given = source, memory_format(order, view.value(source).dim())
            self._made[key] = rewrite.call(self._gm, LAID_OUT, given, {}, near=near)
            self._renewed.add(self._made[key])
        return self._made[key]

    def _renew(self, node: Node) -> None:
        """Its fake value again: other strides, or a view of other memory."""
        plain = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        before = view.value(node)
        if not plain or _is_found_by_a_run(before):
            return
        rule = self._problem.free.get(node)
        keeps = rule is None or rule.keeps(before)
        rewrite.compute_value(node, None if keeps else torch.contiguous_format)
        after = view.value(node)
        if not isinstance(after, Tensor):
            self._renewed.add(node)
        elif not same_sizes(after.stride(), before.stride()):
            self._renewed.add(node)
            self._traced[node] = before
        elif view.is_view(node) or node.target is operator.getitem:
            self._renewed.add(node)


def _is_found_by_a_run(value: Any) -> bool:
    """Whether it has sizes without a hint: computed again, they would be other symbols."""
    leaves = tree_leaves(value)
    sizes = [s for x in leaves if isinstance(x, Tensor) for s in (*x.shape, *x.stride())]
    numbers = [x for x in (*leaves, *sizes) if isinstance(x, (torch.SymInt, torch.SymFloat))]
    return any(not x.node.has_hint() for x in numbers)
