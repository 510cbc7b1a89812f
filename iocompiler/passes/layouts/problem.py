"""A graph as a labelling: which values have two orders, who reads them how, what differing costs.

A label is True for channels last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from iocompiler.cost_model.convolution_order import computes_in_matrix_units, why_not_last
from iocompiler.cost_model.device import Device
from iocompiler.graph import view
from iocompiler.graph.storage_order import Order, is_movable, order_of
from iocompiler.passes.layouts.cut import Copy, Labelling
from iocompiler.passes.layouts.prices import Prices, bytes_of
from iocompiler.passes.layouts.rules import Rule, operands, rule_of
from iocompiler.tf32 import convolutions_rounded

Reader: TypeAlias = Node | str
# in the place of readers that take a value only in the order it had
_AS_TRACED = ("contiguous as traced", "channels last as traced")
# for leaving the order a value had: of two labellings of one price the one that changes less
_CHANGE = 1


class Problem:
    """The labelling of one graph.

    Attributes:
        free: the operators whose order is to be chosen, with their rows.
        before: the label of each value as the graph was traced.
        declined: the convolutions that stay as they are, and why.
        wanting: those that compute with channels last, and the bytes that a library copies for it
            in forward and backward where nothing lies so.
        labelling: the values and what they cost.
    """

    def __init__(self, gm: GraphModule, device: Device) -> None:
        self.free: dict[Node, Rule] = {}
        self.before: dict[Node, bool] = {}
        self.declined: dict[Node, str] = {}
        self.wanting: dict[Node, int] = {}
        self.labelling = Labelling(fixed=dict(zip(_AS_TRACED, (False, True), strict=True)))
        self._prices = Prices(device)
        self._readers: dict[Node, list[Reader]] = defaultdict(list)
        self._differentiated = _differentiated(gm)
        self._roots = view.roots(gm)
        self._written = view.written(gm, self._roots)
        for node in gm.graph.nodes:
            self._enter(node)
        self._beside_sums = self._beside()
        for source, readers in self._readers.items():
            self._copies(source, readers)

    def _enter(self, node: Node) -> None:
        rule = rule_of(node)
        given = [] if rule is None else operands(node, rule)
        first = given[0] if given and not is_movable(view.value(node)) else node
        self.before[node] = _order(first) is Order.LAST
        reason = "" if rule is None else self._why_fixed(node, rule, given)
        if reason and rule is not None and rule.convolves:
            self.declined[node] = reason
        if rule is None or reason:
            self.labelling.fixed[node] = self.before[node]
            for each in node.all_input_nodes:
                self._readers[each].append(_AS_TRACED[self.before.get(each, False)])
            return
        self.free[node] = rule
        self.labelling.charge(node, not self.before[node], _CHANGE)
        for each in given:
            self._readers[each].append(node)
        if rule.convolves:
            self.wanting[node] = self._relaid_bytes(node, *given)
            self.labelling.charge(node, False, self._prices.moved(self.wanting[node]))

    def _why_fixed(self, node: Node, rule: Rule, given: list[Node]) -> str:
        """Why an operator stays in the order it was traced in; "" where it need not."""
        if any(self._roots[each] & self._written for each in (node, *given)):
            return "what it reads or makes is written in place"
        if not _has_hints(node, *given):
            return "sizes that only a run finds"
        if not given or (rule.convolves and len(given) < 2):
            return "no images"
        if _order(node) is None:  # could not be turned back exactly
            return "its result lies in neither order"
        return self._why_not_last(node, given[0]) if rule.convolves else ""

    def _why_not_last(self, node: Node, data: Node) -> str:
        image = view.value(data)
        groups = view.named(node).get("groups", 1)
        channels = image.shape[1], view.value(node).shape[1]
        if not torch.backends.cudnn.enabled:
            return "cuDNN is switched off"
        reason = why_not_last(image.dtype, channels, groups)
        tf32 = convolutions_rounded()
        if reason or computes_in_matrix_units(image.dtype, self._prices.device, tf32):
            return reason
        return f"{image.dtype} has no matrix units in convolutions"

    def _relaid_bytes(self, node: Node, data: Node, weight: Node) -> int:
        """All three tensors, in the convolution and in each of its two gradients."""
        runs = 1 + sum(each in self._differentiated for each in (data, weight))
        return runs * sum(2 * bytes_of(view.value(each)) for each in (data, weight, node))

    def _copies(self, source: Node, readers: list[Reader]) -> None:
        """What it costs that readers of a value have another label than it."""
        value = view.value(source)
        if not is_movable(value):
            return
        held: Any = source
        price = self._runs(source) * self._prices.copied(value)
        if self._mixes(source):
            # what is computed in one order may be written in the other, or in both
            held, turned = ("stored", source), self._turned(source, source)
            self._apart(source, {held: None}, turned)
            price = self._prices.written(value) + turned
            for each in filter(self._is_ours, readers):
                self._apart(source, {each: None}, self._cut(source, each))
            readers = [each for each in readers if not self._is_ours(each)]
        self._apart(held, {each: self._without(source, each) for each in readers}, price)

    def _without(self, source: Node, reader: Reader) -> int | None:
        """What a reader pays that has no copy in its order; None: it cannot do without."""
        if not isinstance(reader, Node) or not self._mixes(reader):
            return None
        if self._is_ours(source):
            return self._cut(source, reader)
        return self._turned(source, reader)

    def _cut(self, source: Node, reader: Any) -> int:
        """Two operators of ours, which one kernel computes in one order, are in two: dearer than to
        turn what leaves it.
        """
        return 2 * self._turned(source, source if source in self._beside_sums else reader)

    def _turned(self, source: Node, kernel: Any) -> int:
        """``source`` in another order than all else in a kernel of ours that reads or writes it.
        One that also sums takes one order only: the value, and its gradient, are turned by another.
        """
        value, backward = view.value(source), source in self._differentiated
        if kernel in self._beside_sums:
            return (1 + 2 * backward) * self._prices.written(value)
        return (1 + backward) * self._prices.mixed(value)

    def _mixes(self, node: Any) -> bool:
        rule = self.free.get(node)
        return rule is not None and rule.mixes

    def _is_ours(self, node: Any) -> bool:
        return self._mixes(node) or node in self._beside_sums

    def _beside(self) -> set[Node]:
        """Norms, and what mixes before and behind them: one kernel computes them together."""
        waiting = [node for node, rule in self.free.items() if rule.fuses]
        found = set(waiting)
        while waiting:
            node = waiting.pop()
            around = {*node.all_input_nodes, *node.users} - found
            more = [each for each in around if self._mixes(each)]
            found.update(more)
            waiting += more
        return found

    def _apart(self, source: Any, readers: dict[Any, int | None], price: int) -> None:
        """What it costs that readers have another label than the source, one or the other."""
        for label in (False, True):
            self.labelling.copies.append(Copy(source, label, price, tuple(readers.items())))

    def _runs(self, source: Node) -> int:
        """In the forward, and its gradient in the backward."""
        return 1 + (source in self._differentiated)


def _order(node: Node) -> Order | None:
    value = view.value(node)
    return order_of(value) if isinstance(value, Tensor) else None


def _has_hints(*nodes: Node) -> bool:
    sizes: Iterable[Any] = (size for node in nodes for t in view.tensors(node) for size in t.shape)
    return all(size.node.has_hint() for size in sizes if isinstance(size, torch.SymInt))


def _differentiated(gm: GraphModule) -> set[Node]:
    """The values that have a gradient."""
    regions = view.regions(gm)
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            wanted = node.meta.get("requires_grad", True) and regions[node].grad
        else:
            wanted = regions[node].grad and any(x in found for x in node.all_input_nodes)
        if wanted and any(t.is_floating_point() for t in view.tensors(node)):
            found.add(node)
    return found
