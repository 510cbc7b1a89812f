"""What each operator does with the order of storage of its operands: a table, one row a kind.

An operator of no row reads what it is given in the order that it was traced with, and so does the
caller: views, library calls, what the user copies himself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from iocompiler.graph import view
from iocompiler.graph.sizes import same_sizes
from iocompiler.graph.storage_order import is_movable
from iocompiler.ops.decomposed import norms

aten = torch.ops.aten


@dataclass(frozen=True)
class Rule:
    """An operator that runs in either order.

    Attributes:
        ops: its names, blank-separated; with an overload, that one alone.
        operands: how many of its first arguments lie in its order (a list counts as one); -1: all
            that have the shape of the result.
        mixes: a kernel of ours reads and writes each tensor in the order that it has.
        fuses: a kernel of ours computes it together with what mixes around it, in one order.
        convolves: computes in one order, whatever its tensors lie in.
        keeps: whether what it makes of a tensor lies as that does; it is contiguous else.
    """

    ops: str = ""
    operands: int = 1
    mixes: bool = False
    fuses: bool = False
    convolves: bool = False
    keeps: Callable[[Tensor], bool] = lambda x: True


_FROZEN = Rule(mixes=True)  # a batch norm whose statistics are given takes no sums
_POINTWISE = Rule(operands=-1, mixes=True)  # of torch's tag

RULES = (
    Rule("conv2d conv3d conv_transpose2d conv_transpose3d convolution", 2, convolves=True),
    Rule("to.dtype hardswish prelu rsub", -1, mixes=True),
    Rule("batch_norm", fuses=True),
    Rule("group_norm", fuses=True, keeps=norms.group_norm_keeps_order),
    Rule("max_pool2d avg_pool2d adaptive_avg_pool2d"),
    Rule("upsample_nearest2d upsample_bilinear2d upsample_bicubic2d"),
    Rule("cat constant_pad_nd"),
    Rule("mean.dim sum.dim_IntList amax amin"),
)


def rule_of(node: Node) -> Rule | None:
    """The row of the operator a node calls; None where it has none."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    if target.namespace != "aten" or target._schema.is_mutable or view.is_random(node):
        return None
    if view.named(node).get("memory_format") is not None:
        return None  # it says its order
    found = _BY_NAME.get(target._opname) or _BY_NAME.get(str(target).removeprefix("aten."))
    if target is aten.batch_norm.default and not view.spelled_out(node)[5]:
        return _FROZEN
    if found is None and torch.Tag.pointwise in target.tags:
        found = _POINTWISE
    return found


def operands(node: Node, rule: Rule) -> list[Node]:
    """The tensors that a node reads in its order; those that are broadcast are read as they lie."""
    if rule.operands < 0:
        given: list[Any] = [x for x in node.all_input_nodes if _is_as_large(x, node)]
    else:
        first: list[Any] = view.spelled_out(node)[: rule.operands]
        given = list(first[0]) if isinstance(first[0], (list, tuple)) else first
    return [x for x in given if isinstance(x, Node) and is_movable(view.value(x))]


def _is_as_large(operand: Node, node: Node) -> bool:
    small, large = view.value(operand), view.value(node)
    if not isinstance(small, torch.Tensor) or not isinstance(large, torch.Tensor):
        return False
    return same_sizes(small.shape, large.shape)


_BY_NAME = {name: rule for rule in RULES for name in rule.ops.split()}
