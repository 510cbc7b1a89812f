"""What an attention is, however it was written: operands in common axes and the score program
between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from iocompiler.passes.attention.dims.axes import Axis, Dims
from iocompiler.passes.attention.dims.views import Operand


@dataclass(frozen=True)
class Inverse:
    """One over a symbolic number or a tensor of one element."""

    of: Node


@dataclass(frozen=True)
class Scale:
    """The scores are multiplied by a number: a Python one, a symbolic one, a tensor of one element,
    an `Inverse` of these; or, where ``dims`` are given, by a tensor with these.
    """

    factor: Any
    dims: Dims = ()


@dataclass(frozen=True)
class Bias:
    """``factor * node`` is added to the scores; ``dims`` are the node's."""

    node: Node
    dims: Dims
    factor: float = 1.0


@dataclass(frozen=True)
class Fill:
    """Where ``condition`` is not ``keep``, the score becomes ``value``; ``dims`` are the
    condition's, which is boolean, or with ``keep`` also 1 and 0.
    """

    condition: Node
    dims: Dims
    value: float
    keep: bool


@dataclass(frozen=True)
class Causal:
    """Only j <= i stays, counted from the start of both."""


@dataclass(frozen=True)
class Cast:
    """The scores are rounded to a dtype."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Pointwise:
    """An operator applied to each score, with the other arguments it takes, and what its result is
    rounded to.
    """

    target: Any
    arguments: tuple[Any, ...] = ()
    dtype: torch.dtype = torch.float32


Step: TypeAlias = Scale | Bias | Fill | Causal | Cast | Pointwise


@dataclass(frozen=True)
class Beside:
    """A sink: one more score in each row, a number or a tensor with ``dims``, whose probability
    nobody reads.

    Attributes:
        guards: whether a row in which nothing else counts is zeros.
    """

    of: Node | float
    dims: Dims
    guards: bool


@dataclass(frozen=True)
class RowSum:
    """A node that is the log-sum-exp of each row of scores, with its dims."""

    node: Node
    dims: Dims


@dataclass(frozen=True)
class Operands:
    """What an attention is of, in common axes.

    Attributes:
        query, key, value: query has the axis ``row``, key and value ``column``; ``width`` is
            contracted between query and key, ``value_width`` is value's own.
        rows: the axes of the output but the last, in its order: batch, heads and ``row``.
    """

    query: Operand
    key: Operand
    value: Operand
    row: Axis | None
    column: Axis
    width: Axis
    value_width: Axis
    rows: tuple[Axis, ...]


@dataclass(frozen=True)
class Attention(Operands):
    """softmax over ``column`` of the scores after ``steps``, times ``value``.

    Attributes:
        steps: the score program, in the order it is applied to query times key.
        dropout_p: of the probabilities.
        dtype: of the output.
        anchor: the node that computes the output, with ``dims``.
        interior: the nodes that need not be computed any more.
        sink: what is beside the scores.
        row_sums: what else is made of the scores and read outside of it.
        probabilities: the nodes that are what the values are multiplied by, in their order.
        is_shared: whether one of them is read outside too, and stays as it was written.
        weights: where there is no softmax, what the function is called that makes weights of the
            scores.
    """

    steps: tuple[Step, ...]
    dropout_p: float
    dtype: torch.dtype
    anchor: Node
    dims: Dims
    interior: frozenset[Node]
    sink: Beside | None = None
    row_sums: tuple[RowSum, ...] = ()
    probabilities: tuple[Node, ...] = ()
    is_shared: bool = False
    weights: str = ""

    @property
    def reads_rows(self) -> bool:
        """Whether the log-sum-exp of its rows is more than a means."""
        return self.sink is not None or bool(self.row_sums)


class Declined(Exception):
    """This is nearly an attention: the message says what is in the way."""


class Sum(Declined):
    """The scores are a sum of two contractions, ``node``: they may be one (`joined.join`)."""

    def __init__(self, node: Node) -> None:
        super().__init__("the scores are a sum of two contractions")
        self.node = node


NO_AXIS = "the softmax is over no single axis of the scores"


class Apart(Declined):
    """The softmax is over several axes of the scores that ``node`` computes: they may have been
    parted for a while (`rejoined.rejoin`), or are for good.
    """

    def __init__(self, node: Node) -> None:
        super().__init__(NO_AXIS)
        self.node = node


class Mix(Declined):
    """What is contracted with the values is a sum of probabilities: `mixed.part` makes
    attentions of it.
    """

    def __init__(self, node: Node) -> None:
        super().__init__(f"{node.target} between the softmax and the second contraction")
        self.node = node
