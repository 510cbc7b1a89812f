"""The functions that higher-order operators call: branches, bodies of loops, scores.

Most of these operators only call them, and any function will do: a plan of its own, with kernels.
Others run them under a transform (``vmap``), where only calls of aten can stand.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

import sympy
import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node

from iocompiler.errors import CannotPlan
from iocompiler.graph import view
from iocompiler.plan.data import Plan, Region, TensorSpec
from iocompiler.plan.found import finders, symbols_of
from iocompiler.plan.steps import Steps, target_name

CALLS_ONLY = frozenset(
    ("cond", "while_loop", "while_loop_stack_output", "scan", "map_impl", "invoke_subgraph")
)
"""The operators that call their functions with plain tensors, and do nothing else with them."""


def returns(gm: GraphModule) -> Literal["value", "tuple", "list"]:
    """What the function of the graph returns."""
    (output,) = gm.graph.find_nodes(op="output")
    results = output.args[0]
    if isinstance(results, list):
        return "list"
    return "tuple" if isinstance(results, tuple) else "value"


def listed(results: Any) -> Sequence[Any]:
    """The results of a graph, where a lone one stands for a list of one."""
    return results if isinstance(results, (list, tuple)) else [results]


def sizes_are_given(gm: GraphModule) -> bool:
    """Whether the inputs of the graph tell every size in it that no call finds."""
    given: set[sympy.Symbol] = set(finders(gm.graph))
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else [value]
        alone = (s.node.expr for s in sizes if isinstance(s, torch.SymInt))
        given |= {expr for expr in alone if isinstance(expr, sympy.Symbol)}
    used = (symbols_of(node.meta.get("val")) for node in gm.graph.nodes)
    return set().union(*used) <= given


def plain_region(name: str, gm: GraphModule, device: torch.device) -> Region:
    """The function with one call of aten for each node.

    Raises:
        CannotPlan: it needs a size it is not given, or what is called is no operator.
    """
    if not sizes_are_given(gm):
        raise CannotPlan(operator=f"{name}, a function that needs sizes it is not given,")
    return Region(name, _Calls(gm, device).plan(), returns(gm), exact=False)


class _Calls(Steps):
    """A graph as calls only, none of which promises a layout."""

    def __init__(self, gm: GraphModule, device: torch.device) -> None:
        super().__init__(gm)
        self._device = device

    def plan(self) -> Plan:
        inputs = self.inputs()
        for node in view.calls(self.gm):
            if node.target is not operator.getitem and not _is_size(node):
                self.call(node, "inside of a higher-order operator")
        (output,) = self.gm.graph.find_nodes(op="output")
        outputs = tuple(self.argument(a, output) for a in listed(output.args[0]))
        return Plan(tuple(inputs), tuple(self.steps), outputs, str(self._device))

    def spec(self, value: Any) -> TensorSpec | None:
        return None

    def region(self, node: Node, inner: GraphModule, caller: Node) -> Region:
        return plain_region(str(node.target), inner, self._device)

    def made_elsewhere(self, node: Node) -> str:
        raise CannotPlan(operator=target_name(node.target))


def _is_size(node: Node) -> bool:
    """Arithmetic on sizes, which the plan does where the result is used."""
    return not isinstance(node.target, (OpOverload, HigherOrderOperator))
