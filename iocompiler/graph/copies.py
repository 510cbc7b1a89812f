"""The copies a program asks for: operators that lay elements out anew and compute nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from iocompiler.graph.view import where

_OPERATORS = frozenset(
    {"clone", "contiguous", "flatten", "reshape", "repeat", "repeat_interleave", "tile"}
)


@dataclass(frozen=True)
class Copy:
    """One copy: the operator, the user's line, the bytes it reads and writes as it stands."""

    operator: str
    where: str
    bytes: int


def copies(gm: GraphModule) -> Iterator[Copy]:
    """Those of a captured graph, in order; sizes that are symbols at their hints. Operators whose
    result is a view of what they are given are none.
    """
    for node in gm.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        operator, source = node.target._opname, next(iter(node.all_input_nodes), None)
        if operator in _OPERATORS and source is not None:
            given, made = source.meta.get("val"), node.meta.get("val")
            if isinstance(given, Tensor) and isinstance(made, Tensor) and not _shared(given, made):
                bytes_ = (elements(given) + elements(made)) * made.element_size()
                yield Copy(operator, where(node), bytes_)


def _shared(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def elements(x: Tensor) -> int:
    """How many elements lie in memory, symbols at their hints: of a broadcast dimension one."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        if not _is_zero(stride):
            count *= _hint(size)
    return count


def _is_zero(stride: Any) -> bool:
    return isinstance(stride, int) and stride == 0


def _hint(size: Any) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.hint) if size.node.has_hint() else 1
