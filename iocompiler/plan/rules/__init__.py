"""Which ATen operators the planner generates code for: one rule an operator, in one table."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from iocompiler.plan.lowering import Rule
from iocompiler.plan.rules.elementwise import ELEMENTWISE
from iocompiler.plan.rules.indexing import INDEXING
from iocompiler.plan.rules.placing import PLACING
from iocompiler.plan.rules.reduction import REDUCTIONS, SCANS, folded_dims

RULES: dict[Any, Rule] = {**ELEMENTWISE, **INDEXING, **PLACING, **REDUCTIONS, **SCANS}

DTYPES = frozenset(
    {
        torch.float64, torch.float32, torch.bfloat16, torch.float16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    }
)  # fmt: skip


def _key(node: Node) -> Any:
    # our own operators go by name: their registration is not imported here
    return str(node.target) if node.target not in RULES else node.target


def rule_of(node: Node) -> Rule:
    """The node's rule; KeyError without one."""
    return RULES[_key(node)]


def has_rule(node: Node) -> bool:
    return node.op == "call_function" and _key(node) in RULES


def is_elementwise(node: Node) -> bool:
    """Whether element i of the result depends only on element i (broadcast) of the operands."""
    return node.target in ELEMENTWISE


def is_reduction(node: Node) -> bool:
    """Whether the node folds some of its input's dimensions, or scans along one."""
    return folded_dims(node) is not None


__all__ = [
    "DTYPES",
    "RULES",
    "folded_dims",
    "has_rule",
    "is_elementwise",
    "is_reduction",
    "rule_of",
]
