"""From the last product of a chain to its matrices and the order it is written in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from iocompiler.cost_model.product_order import Order
from iocompiler.graph import view

aten = torch.ops.aten
PRODUCTS = (
    aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.linear.default,
)  # fmt: skip
_FACTORS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


@dataclass(frozen=True)
class Matrix:
    """What ``node`` computes; ``turned``: its last two dimensions the other way round."""

    node: Node
    turned: bool


@dataclass
class Chain:
    """A product of products.

    Attributes:
        matrices: from left to right.
        number: what the whole is multiplied by.
        order: as it is written.
        inside: the calls it consists of.

    Args:
        is_mine: whether a call of the chain's, which nobody else reads, may be part of it.
    """

    is_mine: Callable[[Node], bool]
    matrices: list[Matrix] = field(default_factory=list)
    number: float = 1.0
    inside: list[Node] = field(default_factory=list)
    order: Order = 0

    def read(self, top: Node) -> Chain:
        self.order = self._product(top, False)
        return self

    def _product(self, node: Node, turned: bool) -> Order:
        """(AB)^T = B^T A^T."""
        self.inside.append(node)
        sides = [(node.args[0], turned), (node.args[1], turned != _turns_its_second(node))]
        first, second = reversed(sides) if turned else sides
        return self._operand(*first), self._operand(*second)

    def _operand(self, node: Any, turned: bool) -> Order:
        """The product behind transpositions and numbers; else the operand itself."""
        number, flipped, at = 1.0, turned, node
        walked: list[Node] = []
        while isinstance(at, Node) and self.is_mine(at):
            if is_product(at):
                self.number *= number
                self.inside += walked
                return self._product(at, flipped)
            times = _number(at)
            if times is None and not _is_turned(at):
                break
            number, flipped = (number, not flipped) if times is None else (number * times, flipped)
            walked.append(at)
            at = at.args[0]
        self.matrices.append(Matrix(node, turned))
        return len(self.matrices) - 1


def is_product(node: Node) -> bool:
    """Of two tensors, with nothing added."""
    return node.target in PRODUCTS and len(node.args) == 2 and not node.kwargs


def _turns_its_second(node: Node) -> bool:
    return node.target is aten.linear.default


def _is_turned(node: Node) -> bool:
    if node.target is not aten.transpose.int:
        return False
    rank, dims = view.tensors(node)[0].dim(), node.args[1:3]
    return {d % rank for d in dims} == {rank - 2, rank - 1}  # type: ignore[operator]


def _number(node: Node) -> float | None:
    """What a call multiplies by, where that is a finite number other than zero."""
    if node.target not in _FACTORS or node.kwargs or not isinstance(node.args[0], Node):
        return None
    number = node.args[1]
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not number:
        return None
    if not math.isfinite(number):
        return None
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    return 1.0 / number if divides else float(number)
